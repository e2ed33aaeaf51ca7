"""The Kronecker approximation of a softmax head's Hessian: mean curvature (x) mean of h h^T, for heads of any size.

It would be exact if a sample's curvature did not depend on its features. The eigenvectors of both factors diagonalize
it, so that nothing larger than C x C, D x D or C x D is formed.

Source: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015,
https://arxiv.org/abs/1503.05671.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.errors import DataError
from kdfast.ops.softmax_head.curvature import curvature_terms
from kdfast.ops.softmax_head.data import HeadData
from kdfast.ops.softmax_head.dense_hessian import append_bias
from kdfast.ops.softmax_head.residuals import LossConfig, residuals
from kdfast.progress import Progress

__all__ = ["Factors", "FeatureFactor", "feature_factor", "kronecker_factors", "kronecker_self_influence"]


class FeatureFactor(NamedTuple):
    """Eigenvalues (D,) and eigenvectors (D, D) of the mean of h h^T, which depend on no weights; float64."""

    values: Tensor
    vectors: Tensor


class Factors(NamedTuple):
    """Eigenvectors (C, C) and (D, D) of both factors, and the inverse eigenvalues (C, D) of H; float64.

    The inverse of H maps b (C, D) to ``left ((left^T b right) * scale) right^T``.
    """

    left: Tensor
    right: Tensor
    scale: Tensor


def feature_factor(data: HeadData) -> FeatureFactor:
    """Read the data once and return the eigenvalues and eigenvectors of X^T X / N.

    Raises:
        DataError: If a product overflows.
    """
    g, rows = torch.zeros(data.dim, data.dim, dtype=torch.float64, device=data.device), 0
    for tile in data.tiles(dtype=torch.float64):
        x = append_bias(tile, data)
        g.addmm_(x.mT, x)
        rows += len(x)
    return _feature_factor(data, g, rows)


def kronecker_factors(
    data: HeadData,
    l2: float,
    loss: LossConfig,
    progress: Progress | None,
    note: str,
    features: FeatureFactor | None = None,
) -> Factors:
    """Read the data once and return the factors of mean(S) (x) X^T X / N + l2.

    Args:
        data: The samples.
        l2: Weight of the penalty.
        loss: The training loss.
        progress: Called with (rows read, rows in total, note).
        note: For ``progress``.
        features: The factor of the same features; None computes it.

    Raises:
        DataError: If a product overflows, or the data is invalid.
    """
    s = torch.zeros(data.num_classes, data.num_classes, dtype=torch.float64, device=data.device)
    g = torch.zeros(data.dim, data.dim, dtype=torch.float64, device=data.device)
    rows = 0
    for tile in data.tiles(data.num_classes, torch.float64, progress, note):
        for weight, p in curvature_terms(tile.z, loss):
            s.add_(torch.diag(p.sum(0)) - p.mT @ p, alpha=weight)
        if features is None:
            x = append_bias(tile, data)
            g.addmm_(x.mT, x)
        rows += len(tile.x)
    features = features or _feature_factor(data, g, rows)
    if data.reduce is not None:
        s, rows = data.reduce(s), data.count_rows()
    values, vectors = torch.linalg.eigh(s / rows)
    scale = 1 / (values.clamp_min(0)[:, None] * features.values.clamp_min(0) + l2)
    return Factors(vectors, features.vectors, scale)


def _feature_factor(data: HeadData, g: Tensor, rows: int) -> FeatureFactor:
    if data.reduce is not None:
        g, rows = data.reduce(g), data.count_rows()
    if not bool(g.isfinite().all()):
        raise DataError("the products of the features overflow float64: scale the features down")
    return FeatureFactor(*torch.linalg.eigh(g / rows))


def kronecker_self_influence(data: HeadData, factors: Factors, loss: LossConfig, progress: Progress | None) -> Tensor:
    """Return g^T H^-1 g of each sample for the approximate H, (N,) float64, not divided by N.

    A gradient is r h^T, so that it is a sum over pairs of eigenvectors: sum of (left^T r)_c^2 (right^T h)_d^2
    scale_cd. The products are computed in the dtype of the data: all terms are positive. `data.num_rows` must be set.
    """
    left, right, scale = (part.to(data.dtype) for part in factors)
    # Tensors kept per tile would fragment the memory.
    effects = torch.empty(data.num_rows, dtype=torch.float64, device=data.device)
    for tile in data.tiles(data.num_classes, torch.float64, progress, "self-influence"):
        r = residuals(tile.z, tile.y, tile.t, loss).to(data.dtype)
        x = append_bias(tile, data).to(data.dtype)
        terms = ((r @ left).square() @ scale) * (x @ right).square()
        effects[tile.start : tile.start + len(x)] = terms.sum(1, dtype=torch.float64)
    return effects
