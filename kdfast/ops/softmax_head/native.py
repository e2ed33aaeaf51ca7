"""Compiled kernels of the softmax head: passes tensors as addresses and strides, and allocates the outputs."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from kdfast.ops.native import WIDEST_ISA, extension

__all__ = ["add_fused_products", "apply_logit_hessian_", "can_fuse_products", "norms", "residuals"]


def residuals(
    z: Tensor,
    y: Tensor | None,
    t: Tensor | None,
    alpha: float,
    temperature: float,
    isa_limit: int = WIDEST_ISA,
) -> Tensor:
    """Compute ``kdfast.ops.softmax_head.residuals.residuals`` in float32 or float64, on a CPU or a GPU.

    ``isa_limit`` (0, 1, 2: baseline, x86-64-v3, x86-64-v4) lets tests compare instruction sets.

    Raises:
        ValueError: If an operand is missing, or a label on a CPU is out of range.
    """
    out = torch.empty(z.shape, dtype=z.dtype, device=z.device)
    _residuals(z, y, t, None, 0.0, alpha, temperature, out, None, isa_limit)
    return out


def norms(
    z: Tensor,
    y: Tensor | None,
    t: Tensor | None,
    x: Tensor | None,
    extra: float,
    alpha: float,
    temperature: float,
    isa_limit: int = WIDEST_ISA,
) -> Tensor:
    """Return the residuals' norms times sqrt(||x||^2 + ``extra``), or times 1 without ``x``; (n,).

    Raises:
        ValueError: As ``residuals``.
    """
    out = torch.empty(len(z), dtype=z.dtype, device=z.device)
    _residuals(z, y, t, x, extra, alpha, temperature, None, out, isa_limit)
    return out


def apply_logit_hessian_(a: Tensor, z: Tensor, alpha: float, temperature: float, isa_limit: int = WIDEST_ISA) -> None:
    """Compute ``kdfast.ops.softmax_head.curvature.apply_logit_hessian_``.

    Raises:
        ValueError: If ``a`` has another memory layout than that of ``allocate_products``.
    """
    _, k, _ = a.shape
    if not (a.is_contiguous() if a.is_cuda else _has_samples_last(a)):
        raise ValueError(
            f"products of shape {tuple(a.shape)} have strides {a.stride()}: allocate them with allocate_products"
        )
    stride = a.stride(2)
    z = _dense_rows(z)
    with _device_guard(z):
        extension.head_curvature(_logits_args(z, alpha, temperature, isa_limit), a.data_ptr(), k, stride, _stream(z))


def can_fuse_products(v: Tensor, bias: bool) -> bool:
    """Return whether ``add_fused_products`` can run here for vectors ``v`` (K, C, D)."""
    k, c, d = v.shape
    return v.dtype == torch.float32 and not v.is_cuda and extension.head_products_fit(k * c, d - int(bias))


def add_fused_products(
    out: Tensor, scale: float, x: Tensor, z: Tensor, v: Tensor, bias: bool, alpha: float, temperature: float
) -> None:
    """Compute ``kdfast.ops.softmax_head.curvature.add_fused_products``.

    Raises:
        ValueError: If ``can_fuse_products`` is false.
    """
    z, x, v = _dense_rows(z), _dense_rows(x), v.resolve_neg().contiguous()
    extension.head_products(
        _logits_args(z, alpha, temperature, WIDEST_ISA),
        x.data_ptr(),
        x.shape[1],
        x.stride(0),
        bias,
        v.data_ptr(),
        v.shape[0],
        scale,
        out.data_ptr(),
    )


def _residuals(
    z: Tensor,
    y: Tensor | None,
    t: Tensor | None,
    x: Tensor | None,
    extra: float,
    alpha: float,
    temperature: float,
    residuals: Tensor | None,
    norms: Tensor | None,
    isa_limit: int,
) -> None:
    # These names keep contiguous copies alive until the call returns: it receives only their addresses.
    z = _dense_rows(z)
    y = None if y is None else y.contiguous()
    t = None if t is None else _dense_rows(t)
    x = None if x is None else _dense_rows(x)
    with _device_guard(z):
        extension.head_residuals(
            _logits_args(z, alpha, temperature, isa_limit),
            _address(y),
            _address(t),
            0 if t is None else t.stride(0),
            _address(x),
            0 if x is None else x.shape[1],
            0 if x is None else x.stride(0),
            extra,
            _address(residuals),
            _address(norms),
            _stream(z),
        )


def _logits_args(
    z: Tensor, alpha: float, temperature: float, isa_limit: int
) -> tuple[int, int, int, int, bool, float, float, int, int]:
    rows, classes = z.shape
    is_double = z.dtype == torch.float64
    return z.data_ptr(), rows, classes, z.stride(0), is_double, alpha, temperature, torch.get_num_threads(), isa_limit


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _dense_rows(x: Tensor) -> Tensor:
    """Return ``x`` with contiguous rows and without a pending negation; a copy only if needed."""
    x = x.resolve_neg()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _has_samples_last(a: Tensor) -> bool:
    n, k, c = a.shape
    sample, vector, class_ = a.stride()
    return (sample == 1 or n == 1) and (vector == c * class_ or k == 1) and class_ >= n


def _device_guard(z: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()


def _stream(z: Tensor) -> int:
    return torch.cuda.current_stream(z.device).cuda_stream if z.is_cuda else -1
