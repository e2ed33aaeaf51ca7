"""The softmax head's Hessian and its derivative as matrices, and the leverage of single samples, for small heads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.ops.softmax_head.curvature import curvature_terms, third_derivative_terms
from kdfast.ops.softmax_head.data import HeadData, Tile, compute_logits
from kdfast.ops.softmax_head.residuals import LossConfig
from kdfast.progress import Progress

__all__ = ["append_bias", "hessian", "leverages", "third_derivative"]


RowEntries = Callable[[int], Tensor]


def hessian(data: HeadData, l2: float, loss: LossConfig, progress: Progress | None = None) -> Tensor:
    """Return the Hessian (C D, C D) in float64, rows and columns ordered as flattened weights (C, D)."""

    def curvature_rows(tile: Tile) -> RowEntries:
        terms = curvature_terms(tile.z, loss)

        def entries(k: int) -> Tensor:
            s = torch.zeros_like(tile.z[:, k:])
            for weight, p in terms:
                term = -weight * p[:, k : k + 1] * p[:, k:]
                # p (1 - p) as p times the other classes' probabilities: 1 - p cancels for confident samples.
                term[:, 0] = weight * p[:, k] * (p[:, :k].sum(1) + p[:, k + 1 :].sum(1))
                s += term
            return s

        return entries

    h = _mean_kronecker(data, curvature_rows, progress, "Hessian")
    h.diagonal().add_(l2)
    return h


def third_derivative(data: HeadData, u: Tensor, loss: LossConfig, progress: Progress | None = None) -> Tensor:
    """Return the derivative of the Hessian along ``u`` (C, D): (C D, C D) in float64, in the order of the Hessian.

    For logits that change by b it has, in place of a sample's curvature diag(p) - p p^T, diag(q) - p q^T - q p^T with
    q = p (b - p . b): the third derivative of log sum exp.
    """

    def derivative_rows(tile: Tile) -> RowEntries:
        b = compute_logits(tile.x, u, data.bias)
        terms = third_derivative_terms(tile.z, b, loss)

        def entries(k: int) -> Tensor:
            s = torch.zeros_like(tile.z[:, k:])
            for p, q in terms:
                s -= p[:, k : k + 1] * q[:, k:] + q[:, k : k + 1] * p[:, k:]
                s[:, 0] += q[:, k]
            return s

        return entries

    return _mean_kronecker(data, derivative_rows, progress, "third derivative")


def _mean_kronecker(
    data: HeadData, tile_rows: Callable[[Tile], RowEntries], progress: Progress | None, note: str
) -> Tensor:
    """Return the mean over samples of s_i (x) h_i h_i^T for symmetric s_i (C, C), as (C D, C D) in float64.

    Each pair of classes has a (D, D) submatrix, the sum of s_i h_i h_i^T over samples, s_i being their entry. Only
    submatrices on and above the diagonal are computed. ``tile_rows(tile)(k)`` returns entries k and above of row k of
    all samples, (n, C - k).
    """
    c, d = data.num_classes, data.dim
    h = torch.zeros(c * d, c * d, dtype=torch.float64, device=data.device)
    rows = 0
    for tile in data.tiles(c * d, torch.float64, progress, note):
        x, entries = append_bias(tile, data), tile_rows(tile)
        for k in range(c):
            s = entries(k)
            h[k * d : (k + 1) * d, k * d :].addmm_(x.mT, (s[:, :, None] * x[:, None]).flatten(1))
        rows += len(x)
    if data.reduce is not None:
        h, rows = data.reduce(h), data.count_rows()
    h.triu_().div_(rows)
    h += h.triu(1).mT
    return h


def leverages(x: Tensor, inverse: Tensor, num_classes: int) -> Tensor:
    """Return M (n, C, C) with M[c, e] = h^T (H^-1)_{c e} h, for features ``x`` (n, D) with the bias.

    ``inverse`` is H^-1 (C D, C D) or another symmetric matrix in the same order.
    """
    n, d = x.shape
    inverse = inverse.view(num_classes, d, num_classes, d)
    m = torch.empty(n, num_classes, num_classes, dtype=x.dtype, device=x.device)
    for k in range(num_classes):
        product = (x @ inverse[k, :, k:].reshape(d, -1)).view(n, num_classes - k, d)
        m[:, k, k:] = torch.bmm(product, x[:, :, None])[:, :, 0]
        m[:, k + 1 :, k] = m[:, k, k + 1 :]
    return m


def append_bias(tile: Tile, data: HeadData) -> Tensor:
    """Return the features of a tile (n, D), with a 1 appended if the head has a bias."""
    return torch.nn.functional.pad(tile.x, (0, 1), value=1.0) if data.bias else tile.x
