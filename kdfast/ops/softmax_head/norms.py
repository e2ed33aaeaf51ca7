"""Norms of each sample's gradient with respect to a softmax head, without the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops.softmax_head.data import Features, HeadData, Progress
from kdfast.ops.softmax_head.residuals import Target, norms, residuals
from kdfast.ops.softmax_head.validation import Array, check_tensor

__all__ = ["head_grad_norms"]


def head_grad_norms(
    logits: Array | None,
    labels: Array | None,
    features: Features,
    *,
    bias: bool = True,
    teacher: Array | None = None,
    alpha: float = 0.0,
    temperature: float = 4.0,
    l2: float = 0.0,
    weights: Tensor | None = None,
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Norm of each sample's gradient of the loss with respect to the head's weights: ||r|| ||h||.

    For logits z = W h the gradient is the outer product of the residual r and the feature h, so its norm needs no
    gradient. With ``l2`` a sample's loss has the penalty (l2 / 2) ||W||^2, and the squared norm is
    ||r||^2 ||h||^2 + 2 l2 r.z + l2^2 ||W||^2.

    Args:
        logits: (N, C), tensor or array; None when ``features`` are blocks.
        labels: (N,) int64 classes; None when ``features`` are blocks, or ``alpha`` is 1.
        features: (N, D) without the bias, tensor or (memory-mapped) array; or an iterable of blocks
            (features, logits, labels[, teacher]), read once.
        bias: Whether the head has a bias.
        teacher: (N, C) teacher logits, for ``alpha`` > 0.
        alpha: Weight of the divergence from the teacher, in [0, 1].
        temperature: T > 0 of the divergence.
        l2: Weight of the penalty, at least 0.
        weights: (C, D), the bias as the last column when there is one; needed when ``l2`` > 0.
        tile_rows: Rows computed at a time; None chooses by the size of a cache.
        progress: Called with (rows done, rows in all or 0, note).

    Returns:
        (N,), float64 when features or logits are, else float32.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there is no row, a number is not finite, a label is out of range, or every gradient is zero
            because ``alpha`` is 1 and the teacher's logits are the head's own.

    Source: Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet", 2021 (GraNd, for the last layer),
    https://arxiv.org/abs/2107.07075.
    """
    data = HeadData(features, logits, labels, teacher, bias=bias, tile_rows=tile_rows)
    target = Target(alpha, temperature).check()
    if not 0 <= l2 < float("inf"):
        raise ShapeError(f"l2 is {l2}: give a finite number of at least 0")
    if l2 > 0 and weights is None:
        raise ShapeError("weights are missing: with l2 > 0 give the head's (C, D) weights, the bias as last column")
    if weights is not None:
        check_tensor("weights", weights)
        if tuple(weights.shape) != (data.classes, data.dim):
            raise ShapeError(f"weights have shape {tuple(weights.shape)}: {(data.classes, data.dim)} is needed")
        if not bool(weights.isfinite().all()):
            raise DataError("weights are not finite: look for what made them")
    penalty = 0.0 if weights is None else l2 * float(weights.detach().double().norm())
    found = []
    for tile in data.tiles(progress=progress, note="gradient norms", unchecked=("features",)):
        norm = norms(tile.z, tile.y, tile.t, tile.x, bias, target)
        if l2 > 0:
            dot = (residuals(tile.z, tile.y, tile.t, target) * tile.z).sum(1)
            norm = (norm.square() + 2 * l2 * dot + penalty**2).clamp_min_(0).sqrt_()
        found.append(norm)
    result = torch.cat(found)
    if not bool(result.isfinite().all()):
        data.explain("the gradient norms", result.dtype)
    target.check_alive(result)
    return result
