"""The softmax head's Hessian and its derivative as matrices, and the leverage of single samples, for small heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.ops.softmax_head.data import HeadData, Progress, Tile, linear
from kdfast.ops.softmax_head.residuals import Target, probabilities, third_parts

__all__ = ["hessian", "leverages", "third_derivative", "with_bias"]


Entries = Callable[[int], Tensor]


def hessian(data: HeadData, l2: float, target: Target, progress: Progress | None = None) -> Tensor:
    """The Hessian (C D, C D) in float64, rows and columns ordered as weights (C, D) flattened."""

    def curvature(tile: Tile) -> Entries:
        parts = probabilities(tile.z, target)

        def entries(k: int) -> Tensor:
            s = torch.zeros_like(tile.z[:, k:])
            for weight, p in parts:
                part = -weight * p[:, k : k + 1] * p[:, k:]
                # p (1 - p) from the other classes' probabilities: 1 - p would lose what is left of them to rounding.
                part[:, 0] = weight * p[:, k] * (p[:, :k].sum(1) + p[:, k + 1 :].sum(1))
                s += part
            return s

        return entries

    h = _mean_of_blocks(data, curvature, progress, "Hessian")
    h.diagonal().add_(l2)
    return h


def third_derivative(data: HeadData, u: Tensor, target: Target, progress: Progress | None = None) -> Tensor:
    """The derivative of the Hessian along ``u`` (C, D): a matrix as the Hessian is, (C D, C D) in float64.

    For logits that change by b it has, in place of a sample's curvature diag(p) - p p^T, diag(q) - p q^T - q p^T with
    q = p (b - p . b): the third derivative of log sum exp.
    """

    def change(tile: Tile) -> Entries:
        b = linear(tile.x, u, data.bias)
        parts = third_parts(tile.z, b, target)

        def entries(k: int) -> Tensor:
            s = torch.zeros_like(tile.z[:, k:])
            for p, q in parts:
                s -= p[:, k : k + 1] * q[:, k:] + q[:, k : k + 1] * p[:, k:]
                s[:, 0] += q[:, k]
            return s

        return entries

    return _mean_of_blocks(data, change, progress, "third derivative")


def _mean_of_blocks(
    data: HeadData, matrices: Callable[[Tile], Entries], progress: Progress | None, note: str
) -> Tensor:
    """The mean of s_i (x) h_i h_i^T for symmetric s_i (C, C), as a matrix (C D, C D) in float64.

    Blocks of two classes are sums of s_i h_i h_i^T, s_i being an entry; only those on and above the diagonal are
    computed. ``matrices(tile)(k)`` gives (n, C - k): entries k and above of row k, of all samples.
    """
    c, d = data.classes, data.dim
    h = torch.zeros(c * d, c * d, dtype=torch.float64, device=data.device)
    rows = 0
    for tile in data.tiles(c * d, torch.float64, progress, note):
        x, entries = with_bias(tile, data), matrices(tile)
        for k in range(c):
            s = entries(k)
            h[k * d : (k + 1) * d, k * d :].addmm_(x.mT, (s[:, :, None] * x[:, None]).flatten(1))
        rows += len(x)
    h.triu_().div_(rows)
    h += h.triu(1).mT
    return h


def leverages(x: Tensor, inverse: Tensor, classes: int) -> Tensor:
    """M (n, C, C) with M[c, e] = h^T (H^-1)_{c e} h for features ``x`` (n, D) with the bias, and H^-1 (C D, C D)."""
    n, d = x.shape
    blocks = inverse.view(classes, d, classes, d)
    m = torch.empty(n, classes, classes, dtype=x.dtype, device=x.device)
    for k in range(classes):
        product = (x @ blocks[k, :, k:].reshape(d, -1)).view(n, classes - k, d)
        m[:, k, k:] = torch.bmm(product, x[:, :, None])[:, :, 0]
        m[:, k + 1 :, k] = m[:, k, k + 1 :]
    return m


def with_bias(tile: Tile, data: HeadData) -> Tensor:
    """Features of a tile (n, D), the bias's ones appended."""
    return torch.nn.functional.pad(tile.x, (0, 1), value=1.0) if data.bias else tile.x
