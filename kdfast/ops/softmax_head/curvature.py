r"""Curvature of a softmax head: the Hessian of each sample's loss with respect to its logits, times vectors.

In the notation of ``residuals``, the Hessian of a sample's loss is

    S = (1 - a) (diag(p) - p p^T) + a (diag(p_T) - p_T p_T^T).

S v is computed as S (v - v_m), which is equal since S 1 = 0, with m the most probable class: this avoids cancellation
for confident samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.softmax_head.residuals import LossConfig, use_native

__all__ = [
    "add_fused_products",
    "allocate_products",
    "apply_logit_hessian_",
    "can_fuse_products",
    "curvature_matrices",
    "curvature_propagates_nan",
    "curvature_terms",
    "reference_curvature_",
    "third_derivative_terms",
]


def allocate_products(rows: int, v: Tensor) -> Tensor:
    """Allocate products of samples with vectors ``v`` (K, C, D): (rows, K, C), as ``apply_logit_hessian_`` needs them.

    On a CPU samples come last in memory, so that sixteen of them fill a SIMD register for any number of classes; on a
    GPU each sample has a thread block, and samples come first. Any first rows of the result have the layout, too.
    """
    k, c, _ = v.shape
    if v.device.type != "cpu":
        return v.new_empty(rows, k, c)
    # The stride between classes is an odd number of cache lines, so that classes do not compete for one cache set.
    stride = (-(-rows // 16) | 1) * 16
    return v.new_empty(k, c, stride)[:, :, :rows].permute(2, 0, 1)


def apply_logit_hessian_(a: Tensor, z: Tensor, loss: LossConfig) -> Tensor:
    """Replace ``a`` (n, K, C), allocated by ``allocate_products``, by S a for each sample."""
    if not use_native(z):
        return reference_curvature_(a, curvature_terms(z, loss))
    from kdfast.ops.softmax_head import native

    native.apply_logit_hessian_(a, z, *loss)
    return a


def curvature_propagates_nan(v: Tensor) -> bool:
    """Return whether ``apply_logit_hessian_`` makes a sample's products NaN if one of its logits is not finite.

    The native CPU kernel does. Elsewhere -inf can pass for a class of probability 0.
    """
    return v.device.type == "cpu" and use_native(v)


def can_fuse_products(v: Tensor, bias: bool) -> bool:
    """Return whether ``add_fused_products`` accepts ``v`` (K, C, D): a few float32 vectors, on a CPU with AVX-512."""
    if v.device.type != "cpu" or not use_native(v):
        return False
    from kdfast.ops.softmax_head import native

    return native.can_fuse_products(v, bias)


def add_fused_products(
    out: Tensor, scale: float, x: Tensor, z: Tensor, v: Tensor, bias: bool, loss: LossConfig
) -> None:
    """Add ``scale`` B^T X to ``out`` (K, C, D), for B = S A and A = X V^T; requires ``can_fuse_products``.

    Args:
        out: float32, contiguous.
        scale: Factor of the products.
        x: (n, D') float32, without the bias.
        z: (n, C) float32. Products are NaN if a logit is not finite.
        v: (K, C, D) float32.
        bias: Whether D = D' + 1 includes the bias.
        loss: The loss.
    """
    from kdfast.ops.softmax_head import native

    native.add_fused_products(out, scale, x, z, v, bias, *loss)


def curvature_terms(z: Tensor, loss: LossConfig) -> list[tuple[float, Tensor]]:
    """Return (weight, probabilities p (n, C)) of each term of S = sum of weight (diag(p) - p p^T)."""
    terms = []
    if loss.alpha < 1:
        terms.append((1 - loss.alpha, z.softmax(1)))
    if loss.alpha > 0:
        terms.append((loss.alpha, (z / loss.temperature).softmax(1)))
    return terms


def curvature_matrices(terms: list[tuple[float, Tensor]]) -> Tensor:
    """Return S of each row, (n, C, C), from its ``curvature_terms``."""
    total: Tensor | None = None
    for weight, p in terms:
        s = -weight * p[:, :, None] * p[:, None]
        diagonal = s.diagonal(dim1=1, dim2=2)
        diagonal.zero_()
        diagonal.copy_(-s.sum(2))
        total = s if total is None else total + s
    assert total is not None
    return total


def third_derivative_terms(z: Tensor, b: Tensor, loss: LossConfig) -> list[tuple[Tensor, Tensor]]:
    """Return the terms of the derivative of S as the logits change by ``b`` (n, C).

    Returns:
        Pairs of (n, C): p and q = weight p (b - p . b) for the sum of diag(q) - p q^T - q p^T. The weight includes the
        derivative of z / T.
    """
    slopes = ([1.0] if loss.alpha < 1 else []) + ([1 / loss.temperature] if loss.alpha > 0 else [])
    return [
        (p, slope * weight * p * (b - (p * b).sum(1, keepdim=True)))
        for slope, (weight, p) in zip(slopes, curvature_terms(z, loss), strict=True)
    ]


def reference_curvature_(a: Tensor, terms: list[tuple[float, Tensor]]) -> Tensor:
    """Compute ``apply_logit_hessian_`` in plain PyTorch, from ``curvature_terms``."""
    most_probable = terms[0][1].argmax(1)[:, None, None].expand(-1, a.shape[1], 1)
    a -= a.gather(2, most_probable)
    total = torch.zeros_like(a)
    for weight, p in terms:
        p = p[:, None]
        total += weight * p * (a - (p * a).sum(2, keepdim=True))
    return a.copy_(total)
