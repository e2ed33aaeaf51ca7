"""Choose a backend for a call of ``kd_loss`` and run its kernels."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from kdfast.errors import UsageError
from kdfast.ops import backends
from kdfast.ops._torch_compat import assume_constant_result
from kdfast.ops.kd_loss.call import KDCall
from kdfast.ops.kd_loss.targets.soft_labels import run_soft_labels

__all__ = ["choose_backend", "kernels", "run_kernel", "run_terms", "scale_rows"]

_MODULES = {"native": "kdfast.ops.kd_loss.native", "triton": "kdfast.ops.kd_loss.triton.launch"}


@assume_constant_result
def choose_backend(device_type: str, dtype: torch.dtype, backend: str, operator: str) -> str:
    """Return "native", "triton" or "reference", as ``kdfast.ops.backends.resolve`` decides.

    ``operator`` is that of ``KDCall.operator``: other divergences than "kl", and calls with alpha or a temperature of
    each sample or with label smoothing, are operators of their own, which have fewer kernels.

    Raises:
        BackendUnavailable: If a named backend cannot run here.
    """
    return backends.resolve(operator, device_type, str(dtype).removeprefix("torch."), backend)


@functools.cache
def kernels(backend: str) -> Any:
    """Import the module with a backend's kernels.

    Raises:
        UsageError: If it is not "native" or "triton".
    """
    if backend not in _MODULES:
        raise UsageError(f"backend={backend!r}: the operator runs 'native' or 'triton'")
    return importlib.import_module(_MODULES[backend])


def run_kernel(backend: str, call: KDCall, need_grad: bool, *, grad: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Run a kernel.

    Args:
        backend: "native" or "triton".
        call: The checked call.
        need_grad: Whether to compute the gradient.
        grad: Contiguous tensor (N, C) to write the gradient to, in the dtype of the logits; may be the logits
            themselves. None: a new one.

    Returns:
        The float32 loss, and the gradient of the logits times ``call.grad_scale()`` (empty unless ``need_grad``).
    """
    if call.soft_labels is not None:
        return run_soft_labels(kernels(backend).kd_loss, call, need_grad, grad)
    result: tuple[Tensor, Tensor] = kernels(backend).kd_loss(call, need_grad, grad=grad)
    return result


def run_terms(call: KDCall) -> tuple[Tensor, Tensor]:
    """Run the native kernel once for the float32 cross-entropy and divergence of each row."""
    both = call.logits.new_empty((2, call.logits.shape[0]), dtype=torch.float32)
    kernels("native").kd_loss(call, need_grad=False, terms=(both[0], both[1]))
    return both[0], both[1]


def scale_rows(backend: str, grad: Tensor, factor: Tensor, scale: float, *, in_place: bool) -> Tensor:
    """Return ``grad * factor * scale``; see ``native.scale_rows``."""
    scaled: Tensor = kernels(backend).scale_rows(grad, factor, scale, in_place=in_place)
    return scaled
