"""``kd_loss`` on a CPU: pass tensors to the compiled kernels as addresses and strides, and allocate their outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.kd_loss import gradient_buffer
from kdfast.ops.kd_loss.call import KDCall
from kdfast.ops.native import DTYPE_CODES, WIDEST_ISA, extension

__all__ = ["kd_loss", "scale_rows"]

DIVERGENCE_CODES = {"kl": 0, "jsd": 1, "dkd": 2, "standardized": 3}
"""Must agree with ``csrc/kd_loss/kd_loss.h``."""

_REDUCTIONS = {"none": 0, "sum": 1, "mean": 2}


def kd_loss(
    call: KDCall,
    need_grad: bool,
    *,
    grad: Tensor | None = None,
    terms: tuple[Tensor, Tensor] | None = None,
    isa_limit: int = WIDEST_ISA,
) -> tuple[Tensor, Tensor]:
    """Compute the loss and the gradient of the logits.

    Args:
        call: The checked call.
        need_grad: Whether to compute the gradient.
        grad: Where to write the gradient; may be the logits themselves, whose rows are read before they are written.
        terms: Two float32 tensors (N,) that receive each row's cross-entropy and divergence.
        isa_limit: Widest instruction set to use (0: baseline, 1: x86-64-v3, 2: x86-64-v4), so that tests can compare
            them.

    Returns:
        The float32 loss, and the gradient times ``call.grad_scale()`` (empty unless ``need_grad``).

    Raises:
        IndexError: If a label, a row or a class id is out of range.
        ShapeError: If sizes do not fit, alpha or the temperature of a sample is out of range, or a top-k teacher
            repeats a class within a row.
    """
    logits, teacher = call.logits.resolve_neg(), call.teacher.resolve_neg()
    if teacher.dtype == torch.float64:
        teacher = teacher.float()
    loss = call.new_loss()
    if grad is None or not need_grad:
        grad = gradient_buffer.new_gradient(logits, tuple(logits.shape) if need_grad else (0,))
    classes = None if call.classes is None else call.classes.contiguous()
    tail, weights = _vector_of(call.tail, torch.float32), _vector_of(call.weights, torch.float32)
    alphas, temperatures = _vector_of(call.alphas, torch.float64), _vector_of(call.temperatures, torch.float64)
    try:
        extension.kd_loss(
            _matrix(logits),
            _matrix(teacher),
            _vector(call.labels),
            _vector(call.rows),
            (_address(classes), _address(tail)),
            _address(weights),
            (call.use_ce, call.use_kl, call.reverse, 1 - call.alpha, call.kl_factor, call.temperature),
            (_address(alphas), _address(temperatures), call.alpha, call.t_squared),
            (DIVERGENCE_CODES[call.divergence], call.first_weight, call.second_weight),
            call.label_smoothing,
            call.ignore_index,
            _REDUCTIONS[call.reduction],
            call.grad_scale(),
            (
                loss.data_ptr(),
                *((0, 0) if terms is None else map(_address, terms)),
                grad.data_ptr() if need_grad else 0,
            ),
            torch.get_num_threads(),
            isa_limit,
        )
    except ValueError as error:
        raise ShapeError(str(error)) from None
    return loss, grad


def scale_rows(grad: Tensor, factor: Tensor, scale: float, *, in_place: bool) -> Tensor:
    """Return ``grad * factor * scale``, rounded once to the dtype of ``grad``.

    Args:
        grad: (N, C), contiguous.
        factor: float32; a scalar, or (N,) for one factor per row.
        scale: A factor common to all rows.
        in_place: Whether the result may overwrite ``grad``. If so, ``grad`` is returned unchanged if factor * scale
            is 1.
    """
    is_scalar = factor.dim() == 0 or factor.stride(0) == 0
    if in_place and is_scalar:
        first = factor if factor.dim() == 0 else factor[:1]
        if grad.numel() == 0 or first.item() * scale == 1.0:
            return grad
    out = grad if in_place else torch.empty_like(grad)
    extension.scale_rows(
        grad.data_ptr(),
        out.data_ptr(),
        DTYPE_CODES[grad.dtype],
        grad.shape[0],
        grad.shape[1],
        (factor.data_ptr(), 0 if is_scalar else factor.stride(0)),
        scale,
        torch.get_num_threads(),
    )
    return out


def _matrix(x: Tensor) -> tuple[int, int, int, int, int, int]:
    """Address, rows, columns, row stride, column stride, dtype code."""
    return x.data_ptr(), *x.shape, *x.stride(), DTYPE_CODES[x.dtype]


def _vector(x: Tensor | None) -> tuple[int, int]:
    """Address and stride."""
    return (0, 0) if x is None else (x.data_ptr(), x.stride(0))


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _vector_of(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).resolve_neg().contiguous()
