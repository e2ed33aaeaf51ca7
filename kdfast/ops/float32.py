"""Float32 arithmetic as IEEE 754 defines it, whatever the process allows its convolutions and matrix products.

On CUDA devices, cuDNN rounds the operands of float32 convolutions to TF32 (10 of 23 bits of the significand) by
default, and a program may allow the same for matrix products, on CPUs also bfloat16. PyTorch has two interfaces to
these settings and fails when one contradicts the other, so both are set.

Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

__all__ = ["full_float32"]

T = TypeVar("T")

_lock = threading.Lock()
_open_blocks = 0
_found: _Settings | None = None


@contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 convolutions and matrix products in float32 during the block, backward passes included.

    The settings belong to the process, not to the thread: what the first of several open blocks found is restored when
    the last one ends. Also usable as a decorator.
    """
    global _open_blocks, _found
    with _lock:
        if _open_blocks == 0:
            _found = _Settings.read()
            _found.forbid()
        _open_blocks += 1
    try:
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            if _open_blocks == 0 and _found is not None:
                _found.restore()
                _found = None


@dataclass(frozen=True)
class _Settings:
    """Precisions of float32 operations.

    Attributes:
        cudnn: Whether cuDNN may use TF32; None if the two interfaces contradict each other.
        matmul: "highest", "high" or "medium"; None likewise.
        operators: (module of ``torch.backends``, its ``fp32_precision``) by kind of operator; none before torch 2.9.
    """

    cudnn: bool | None
    matmul: str | None
    operators: list[tuple[Any, str]]

    @classmethod
    def read(cls) -> _Settings:
        cudnn = _read(lambda: bool(torch.backends.cudnn.allow_tf32))
        matmul = _read(torch.get_float32_matmul_precision)
        return cls(cudnn, matmul, [(operator, operator.fp32_precision) for operator in _operators()])

    def forbid(self) -> None:
        """Forbid all other arithmetic than float32."""
        if self.cudnn:
            torch.backends.cudnn.allow_tf32 = False
        if self.matmul in ("high", "medium"):
            torch.set_float32_matmul_precision("highest")
        for operator, _ in self.operators:
            operator.fp32_precision = "ieee"

    def restore(self) -> None:
        if self.cudnn:
            torch.backends.cudnn.allow_tf32 = True
        if self.matmul in ("high", "medium"):
            torch.set_float32_matmul_precision(self.matmul)
        for operator, precision in self.operators:
            # "none" inherits the setting of all operators; reading it returns the inherited one.
            operator.fp32_precision = "none"
            if operator.fp32_precision != precision:
                operator.fp32_precision = precision


def _operators() -> list[Any]:
    """Return the modules of ``torch.backends`` that have a precision of float32."""
    backends: Any = torch.backends  # PyTorch declares no types for these modules
    if not hasattr(backends.cudnn, "conv"):
        return []
    cudnn, mkldnn = backends.cudnn, backends.mkldnn
    return [cudnn.conv, cudnn.rnn, backends.cuda.matmul, mkldnn.conv, mkldnn.rnn, mkldnn.matmul]


def _read(setting: Callable[[], T]) -> T | None:
    try:
        return setting()
    except RuntimeError:
        return None


# torch 2.9 and 2.10 warn once about the older interface. Filters around every block would instead make Python repeat
# warnings that it shows once.
with warnings.catch_warnings():
    warnings.filterwarnings("ignore", message="Please use the new API settings to control TF32")
    _Settings.read()
