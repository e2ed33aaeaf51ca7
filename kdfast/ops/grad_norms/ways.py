"""The implementation that squares a part: compiled or plain PyTorch, by the dispatch table."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kdfast.ops.backends import resolve
from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.factors import Convolution, Part, Rows

__all__ = ["Ways"]


@dataclass(frozen=True)
class Ways:
    """What the caller asked for: ``method`` as in ``dispatch``, ``backend`` as in the dispatch table."""

    method: str = "auto"
    backend: str = "auto"

    def squares(self, part: Part) -> Tensor:
        """`||G_n||^2` of each sample, `(N,)`; in float64 from the compiled kernels."""
        if not isinstance(part, (Rows, Convolution)):
            return reference.squares(part)
        backend = self.backend
        if backend == "auto" and part.b.dtype == torch.float64:
            backend = "reference"  # no kernel is meant to serve it: nothing to warn of
        dtype = str(part.b.dtype).removeprefix("torch.")
        if resolve("grad_norms", part.b.device.type, dtype, backend) == "reference":
            return reference.squares(part, self.method)
        from kdfast.ops.grad_norms import native

        return native.squares(part, self.method)
