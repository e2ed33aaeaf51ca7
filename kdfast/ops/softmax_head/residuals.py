r"""What happens to each sample of a softmax head on its own: the residual, and the curvature times a vector.

With p = softmax(z), p_T = softmax(z / T), a teacher's q_T = softmax(t / T), and e_y the one-hot label, the loss
(1 - a) CE(p, y) + a T^2 KL(q_T || p_T) has with respect to the logits the gradient and the Hessian

    r = (1 - a) (p - e_y) + a T (p_T - q_T)
    S = (1 - a) (diag(p) - p p^T) + a (diag(p_T) - p_T p_T^T)

Both are computed without the cancellation of p_y - 1 for confident samples: r_y is minus the sum of the other classes'
probabilities, and S v is taken of v - v_m, m being the likeliest class, which changes nothing else, S 1 being 0. A
trained network gives most of its training samples p_y within rounding of 1; these are the samples that scores rank.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops import backends
from kdfast.ops.kd_loss.validation import check_temperature

__all__ = [
    "Target",
    "add_products",
    "curvature_",
    "curvature_shows_logits",
    "curvatures",
    "norms",
    "probabilities",
    "products_are_fused",
    "products_for",
    "residuals",
]


class Target(NamedTuple):
    """The loss: (1 - alpha) CE + alpha T^2 KL."""

    alpha: float = 0.0
    temperature: float = 4.0

    def check(self) -> Target:
        """Itself.

        Raises:
            ShapeError: If alpha or the temperature lies outside its range.
        """
        if not 0 <= self.alpha <= 1:
            raise ShapeError(f"alpha is {self.alpha}: it must lie in [0, 1]")
        check_temperature(self.temperature)
        return self

    def check_alive(self, result: Tensor) -> None:
        """Refuses results that are zero throughout because the head is its own teacher.

        Raises:
            DataError: If so.
        """
        if self.alpha == 1 and not bool(result.any()):
            raise DataError(
                "every gradient is zero: with alpha = 1 the teacher's logits are the head's own, where the divergence "
                "has its minimum. Use hard labels (alpha < 1), or the logits of a proxy"
            )

    def require(self, y: Tensor | None, t: Tensor | None) -> None:
        """Refuses to go on without the labels or the teacher that the loss needs.

        Raises:
            ShapeError: If they are missing.
        """
        if self.alpha < 1 and y is None:
            raise ShapeError("labels are missing: they are needed unless alpha is 1")
        if self.alpha > 0 and t is None:
            raise ShapeError("teacher is missing: give (N, C) teacher logits, or alpha=0")


def residuals(z: Tensor, y: Tensor | None, t: Tensor | None, target: Target) -> Tensor:
    """The gradient of each row's loss with respect to its logits, (n, C).

    Args:
        z: (n, C) float32 or float64.
        y: (n,) int64 in [0, C); may be None when alpha is 1.
        t: (n, C) teacher logits; may be None when alpha is 0.
        target: The loss.

    Raises:
        ShapeError: If the labels or the teacher that the loss needs are missing.
    """
    target.require(y, t)
    if _compiled(z):
        from kdfast.ops.softmax_head import native

        return native.residuals(z, y, t, *target)
    return reference_residuals(z, y, t, target)


def norms(z: Tensor, y: Tensor | None, t: Tensor | None, x: Tensor, bias: bool, target: Target) -> Tensor:
    """||r|| ||h|| of each row, (n,), for features ``x`` (n, D) and a 1 more with a bias.

    Raises:
        ShapeError: As ``residuals``.
    """
    target.require(y, t)
    if _compiled(z):
        from kdfast.ops.softmax_head import native

        return native.norms(z, y, t, x, float(bias), *target)
    r = torch.linalg.vector_norm(reference_residuals(z, y, t, target), dim=1, dtype=torch.float64)
    norms: Tensor = (r * (x.square().sum(1) + int(bias)).sqrt()).to(z.dtype)
    return norms


def products_for(rows: int, v: Tensor) -> Tensor:
    """Room for the products of ``rows`` samples with vectors ``v`` (K, C, D): (rows, K, C), as ``curvature_`` wants it.

    On a CPU samples come last in memory, so that sixteen of them fill a vector whatever the number of classes; on a GPU
    each has a block of threads, and they come first. The first rows of the result are as good as the whole.
    """
    k, c, _ = v.shape
    if v.device.type != "cpu":
        return v.new_empty(rows, k, c)
    # An odd number of cache lines from class to class: else they would all be kept in the same few places of a cache.
    stride = (-(-rows // 16) | 1) * 16
    return v.new_empty(k, c, stride)[:, :, :rows].permute(2, 0, 1)


def curvature_(a: Tensor, z: Tensor, target: Target) -> Tensor:
    """Replaces ``a`` (n, K, C), rows of ``products_for``, by S a, sample by sample."""
    if not _compiled(z):
        return reference_curvature_(a, probabilities(z, target))
    from kdfast.ops.softmax_head import native

    native.curvature_(a, z, *target)
    return a


def products_are_fused(v: Tensor, bias: bool) -> bool:
    """Whether ``add_products`` takes ``v`` (K, C, D): floats, and not too many, on a CPU with AVX-512."""
    if v.device.type != "cpu" or not _compiled(v):
        return False
    from kdfast.ops.softmax_head import native

    return native.products_fit(v, bias)


def add_products(out: Tensor, scale: float, x: Tensor, z: Tensor, v: Tensor, bias: bool, target: Target) -> None:
    """Adds ``scale`` B^T X to ``out`` (K, C, D), with B = S A and A = X V^T, where ``products_are_fused``.

    Args:
        out: float32, contiguous.
        scale: A factor.
        x: (n, D') float32, without the bias.
        z: (n, C) float32. Products are NaN when one is not finite.
        v: (K, C, D) float32.
        bias: Whether D counts a feature that is 1 and that ``x`` does not have.
        target: The loss.
    """
    from kdfast.ops.softmax_head import native

    native.add_products(out, scale, x, z, v, bias, *target)


def curvature_shows_logits(v: Tensor) -> bool:
    """Whether ``curvature_`` makes NaN of a sample's products when one of its logits is not finite.

    The native kernel does. Elsewhere -inf may be taken for a class that is left out.
    """
    return v.device.type == "cpu" and _compiled(v)


def probabilities(z: Tensor, target: Target) -> list[tuple[float, Tensor]]:
    """The parts of the curvature: (weight, probabilities (n, C)) of S = sum of weight (diag(p) - p p^T)."""
    parts = []
    if target.alpha < 1:
        parts.append((1 - target.alpha, z.softmax(1)))
    if target.alpha > 0:
        parts.append((target.alpha, (z / target.temperature).softmax(1)))
    return parts


def third_parts(z: Tensor, b: Tensor, target: Target) -> list[tuple[Tensor, Tensor]]:
    """The parts of the curvature's derivative as the logits change by ``b`` (n, C).

    Returns:
        Pairs of (n, C): p and q = p (b - p . b) for the sum of diag(q) - p q^T - q p^T, q with the part's weight.
    """
    slopes = ([1.0] if target.alpha < 1 else []) + ([1 / target.temperature] if target.alpha > 0 else [])
    return [
        (p, slope * weight * p * (b - (p * b).sum(1, keepdim=True)))
        for slope, (weight, p) in zip(slopes, probabilities(z, target), strict=True)
    ]


def curvatures(parts: list[tuple[float, Tensor]]) -> Tensor:
    """S of each row, (n, C, C)."""
    total: Tensor | None = None
    for weight, p in parts:
        s = -weight * p[:, :, None] * p[:, None]
        diagonal = s.diagonal(dim1=1, dim2=2)
        diagonal.zero_()
        diagonal.copy_(-s.sum(2))
        total = s if total is None else total + s
    assert total is not None
    return total


def reference_residuals(z: Tensor, y: Tensor | None, t: Tensor | None, target: Target) -> Tensor:
    """``residuals`` in plain PyTorch."""
    alpha, temperature = target
    r = torch.zeros_like(z)
    if y is not None and alpha < 1:
        p = z.softmax(1).scatter_(1, y[:, None], 0.0)
        r += (1 - alpha) * p.scatter_(1, y[:, None], -p.sum(1, keepdim=True))
    if t is not None and alpha > 0:
        r += alpha * temperature * ((z / temperature).softmax(1) - (t / temperature).softmax(1))
    return r


def reference_curvature_(a: Tensor, parts: list[tuple[float, Tensor]]) -> Tensor:
    """``curvature_`` in plain PyTorch; ``parts`` as of ``probabilities``."""
    likeliest = parts[0][1].argmax(1)[:, None, None].expand(-1, a.shape[1], 1)
    a -= a.gather(2, likeliest)
    total = torch.zeros_like(a)
    for weight, p in parts:
        p = p[:, None]
        total += weight * p * (a - (p * a).sum(2, keepdim=True))
    return a.copy_(total)


def _compiled(z: Tensor) -> bool:
    name = backends.resolve("softmax_head", z.device.type, str(z.dtype).removeprefix("torch."))
    return name != "reference"
