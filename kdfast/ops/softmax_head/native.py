"""The compiled row operations of a softmax head: tensors to addresses and strides, outputs allocated here."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from kdfast.ops.native import extension

__all__ = ["add_products", "curvature_", "has_cuda", "norms", "products_fit", "residuals"]

_WIDEST_ISA = 2


def has_cuda() -> bool:
    """Whether the extension was built with its CUDA kernels."""
    return bool(extension.cuda)


def residuals(
    z: Tensor,
    y: Tensor | None,
    t: Tensor | None,
    alpha: float,
    temperature: float,
    isa_limit: int = _WIDEST_ISA,
) -> Tensor:
    """``kdfast.ops.softmax_head.residuals.residuals``; float32 or float64, CPU or CUDA.

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
    isa_limit: int = _WIDEST_ISA,
) -> Tensor:
    """Norms of the residuals times the root of ||x||^2 + ``extra`` (1 without ``x``), (n,).

    Raises:
        ValueError: As ``residuals``.
    """
    out = torch.empty(len(z), dtype=z.dtype, device=z.device)
    _residuals(z, y, t, x, extra, alpha, temperature, None, out, isa_limit)
    return out


def curvature_(a: Tensor, z: Tensor, alpha: float, temperature: float, isa_limit: int = _WIDEST_ISA) -> None:
    """``kdfast.ops.softmax_head.residuals.curvature_``.

    Raises:
        ValueError: If ``a`` lies otherwise in memory.
    """
    _, k, _ = a.shape
    if not (a.is_contiguous() if a.is_cuda else _samples_last(a)):
        raise ValueError(f"products of shape {tuple(a.shape)} have strides {a.stride()}: take them from products_for")
    stride = a.stride(2)
    z = _rows(z)
    with _on(z):
        extension.head_curvature(_head(z, alpha, temperature, isa_limit), a.data_ptr(), k, stride, _stream(z))


def products_fit(v: Tensor, bias: bool) -> bool:
    """Whether ``add_products`` can run here for vectors ``v`` (K, C, D)."""
    k, c, d = v.shape
    return v.dtype == torch.float32 and not v.is_cuda and extension.head_products_fit(k * c, d - int(bias))


def add_products(
    out: Tensor, scale: float, x: Tensor, z: Tensor, v: Tensor, bias: bool, alpha: float, temperature: float
) -> None:
    """``kdfast.ops.softmax_head.residuals.add_products``.

    Raises:
        ValueError: If ``products_fit`` is false.
    """
    z, x, v = _rows(z), _rows(x), v.resolve_neg().contiguous()
    extension.head_products(
        _head(z, alpha, temperature, _WIDEST_ISA),
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
    # Held until the call returns: a contiguous copy must outlive its address.
    z = _rows(z)
    y = None if y is None else y.contiguous()
    t = None if t is None else _rows(t)
    x = None if x is None else _rows(x)
    with _on(z):
        extension.head_residuals(
            _head(z, alpha, temperature, isa_limit),
            0 if y is None else y.data_ptr(),
            0 if t is None else t.data_ptr(),
            0 if t is None else t.stride(0),
            0 if x is None else x.data_ptr(),
            0 if x is None else x.shape[1],
            0 if x is None else x.stride(0),
            extra,
            0 if residuals is None else residuals.data_ptr(),
            0 if norms is None else norms.data_ptr(),
            _stream(z),
        )


def _head(z: Tensor, alpha: float, temperature: float, isa_limit: int) -> tuple[object, ...]:
    rows, classes = z.shape
    wide = z.dtype == torch.float64
    return z.data_ptr(), rows, classes, z.stride(0), wide, alpha, temperature, torch.get_num_threads(), isa_limit


def _rows(x: Tensor) -> Tensor:
    """Itself where its columns are contiguous and its signs are in memory."""
    x = x.resolve_neg()
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _samples_last(a: Tensor) -> bool:
    n, k, c = a.shape
    sample, vector, one = a.stride()
    return (sample == 1 or n == 1) and (vector == c * one or k == 1) and one >= n


def _on(z: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(z.device) if z.is_cuda else contextlib.nullcontext()


def _stream(z: Tensor) -> int:
    return torch.cuda.current_stream(z.device).cuda_stream if z.is_cuda else -1
