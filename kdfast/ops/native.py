"""The only importer of the compiled extension: turns CPU tensors into addresses and strides, and allocates outputs."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast import _native
from kdfast.ops.kd_loss import gradient_buffer

__all__ = ["extension", "isa", "kd_loss", "plain_kd_loss", "scale_rows", "shift_views", "shuffled_at"]

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}
_WIDEST_ISA = 2

extension = _native
"""The compiled module itself, for the files beside this one that unpack tensors for it."""


def _scalar() -> Tensor:
    """What fresh scalars are made like; a true tensor, though a mode of fake ones may be active at this import."""
    with torch._C._DisableTorchDispatch():
        return torch.zeros((), dtype=torch.float32, device="cpu")


_native.learn_torch(
    Tensor,
    torch.nn.Parameter,
    _scalar(),
    [
        torch.empty_like,
        torch.is_grad_enabled,
        torch._C._are_functorch_transforms_active,
        torch._C._len_torch_dispatch_stack,
        torch._C._get_tracing_state,
        gradient_buffer.tensor_like,
    ],
)

plain_kd_loss = _native.kd_loss_of_tensors
"""``kdfast.kd_loss`` of the plainest calls, its arguments up to ``direction`` by position and without ``weights``, then
the number of threads: the result that ``tie_to_logits`` takes, with None for what is kept when nothing is
differentiated; or None, with nothing done, for any other call."""


def isa() -> str:
    """The widest instruction set the kernels use here: ``"x86-64-v4"``, ``"x86-64-v3"`` or ``"default"``."""
    name: str = _native.isa()
    return name


def _matrix(x: Tensor) -> tuple[int, int, int, int, int, int]:
    rows, cols = x.shape
    row_stride, col_stride = x.stride()
    return x.data_ptr(), rows, cols, row_stride, col_stride, _DTYPES[x.dtype]


def kd_loss(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor,
    rows: Tensor | None,
    classes: Tensor | None,
    tail: Tensor | None,
    weights: Tensor | None,
    alpha: float,
    temperature: float,
    t_squared: bool,
    ignore_index: int,
    reduction: str,
    reverse: bool,
    hold: float,
    need_grad: bool,
    *,
    terms: tuple[Tensor, Tensor] | None = None,
    isa_limit: int = _WIDEST_ISA,
) -> tuple[Tensor, Tensor]:
    """Loss (scalar, or (N,) for "none") in float32 and its gradient times ``hold`` ((N, C), or empty when not needed).

    Arguments up to ``reverse`` are the fields of ``Operands`` and ``Options``. ``terms``, two float32 tensors (N,),
    receive each row's cross-entropy and divergence. ``isa_limit`` (0, 1, 2: baseline, x86-64-v3, x86-64-v4) exists so
    that tests can compare instruction sets.

    Raises:
        IndexError: If a label, a row or a class id lies outside its range.
        ValueError: If sizes do not fit.
    """
    logits, teacher = logits.resolve_neg(), teacher.resolve_neg()
    loss = logits.new_empty(logits.shape[:1] if reduction == "none" else (), dtype=torch.float32)
    grad = gradient_buffer.tensor_like(logits, tuple(logits.shape) if need_grad else (0,))
    if teacher.dtype == torch.float64:
        teacher = teacher.float()
    if classes is not None:
        classes = classes.contiguous()
    if tail is not None:
        tail = tail.to(torch.float32).resolve_neg().contiguous()
    if weights is not None:
        weights = weights.to(torch.float32).resolve_neg().contiguous()
    _native.kd_loss(
        _matrix(logits),
        _matrix(teacher),
        0 if labels is None else labels.data_ptr(),
        0 if labels is None else labels.stride(0),
        0 if rows is None else rows.data_ptr(),
        0 if rows is None else rows.stride(0),
        0 if classes is None else classes.data_ptr(),
        0 if tail is None else tail.data_ptr(),
        0 if weights is None else weights.data_ptr(),
        alpha < 1,
        alpha > 0,
        reverse,
        1 - alpha,
        alpha * temperature**2 if t_squared else alpha,
        temperature,
        ignore_index,
        _REDUCTIONS[reduction],
        hold,
        loss.data_ptr(),
        0 if terms is None else terms[0].data_ptr(),
        0 if terms is None else terms[1].data_ptr(),
        grad.data_ptr() if need_grad else 0,
        torch.get_num_threads(),
        isa_limit,
    )
    return loss, grad


def scale_rows(grad: Tensor, factor: Tensor, scale: float, *, in_place: bool) -> Tensor:
    """``grad * factor * scale``, rounded once to the dtype of ``grad``.

    Args:
        grad: (N, C), contiguous.
        factor: A scalar, or (N,) for one factor a row; float32.
        scale: A factor common to all rows.
        in_place: Whether the result may take the memory of ``grad``. Then nothing is computed when all factors are
            known to be one.
    """
    single = factor.dim() == 0 or factor.stride(0) == 0
    if in_place and single:
        first = factor if factor.dim() == 0 else factor[:1]
        if grad.numel() == 0 or first.item() * scale == 1.0:
            return grad
    out = grad if in_place else torch.empty_like(grad)
    n, c = grad.shape
    stride = 0 if single else factor.stride(0)
    threads = torch.get_num_threads()
    _native.scale_rows(
        grad.data_ptr(), out.data_ptr(), _DTYPES[grad.dtype], n, c, factor.data_ptr(), stride, scale, threads
    )
    return out


def shift_views(
    images: Tensor, moves: Tensor, affine: Tensor, pad: int, dtype: torch.dtype, isa_limit: int = _WIDEST_ISA
) -> Tensor:
    """``kdfast.ops.views.shift_views`` on the CPU, with the same bits.

    Raises:
        ValueError: If a move leaves the padded image.
    """
    images, moves, affine = images.contiguous(), moves.contiguous(), affine.contiguous()
    batch, height, width, channels = images.shape
    out = torch.empty((batch, height, width, channels), dtype=dtype)
    _native.shift_views(
        images.data_ptr(),
        moves.data_ptr(),
        affine[0].data_ptr(),
        affine[1].data_ptr(),
        batch,
        height,
        width,
        pad,
        out.data_ptr(),
        _DTYPES[dtype],
        torch.get_num_threads(),
        isa_limit,
    )
    return out.permute(0, 3, 1, 2)


def shuffled_at(position: int, size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """``kdfast.data.stateless_random.shuffled_at`` for one position and keys (n,): int64 (n,).

    Raises:
        ValueError: If the position or the size is out of range.
    """
    keys = np.ascontiguousarray(keys)
    out = np.empty(len(keys), np.int64)
    _native.shuffled_at(position, size, keys.ctypes.data, len(keys), out.ctypes.data, torch.get_num_threads())
    return out
