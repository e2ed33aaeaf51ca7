"""Norm of each sample's gradient with respect to a softmax head, without forming the gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops.float32 import full_float32
from kdfast.ops.softmax_head.data import Features, HeadData
from kdfast.ops.softmax_head.residuals import LossConfig, norms, residuals
from kdfast.ops.softmax_head.validation import Array, check_l2, check_tensor
from kdfast.progress import Progress

__all__ = ["head_grad_norms"]


@full_float32()
def head_grad_norms(
    logits: Array | None,
    labels: Array | None,
    features: Features,
    *,
    bias: bool = True,
    teacher: Array | None = None,
    alpha: float | None = None,
    temperature: float = 4.0,
    l2: float = 0.0,
    weights: Tensor | None = None,
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Return the norm of each sample's gradient of the loss with respect to the head's weights: ||r|| ||h||.

    For logits z = W h the gradient is the outer product of the residual r and the feature h, so its norm needs no
    gradient. With ``l2`` a sample's loss includes the penalty (l2 / 2) ||W||^2, and the squared norm is
    ||r||^2 ||h||^2 + 2 l2 r.z + l2^2 ||W||^2.

    Args:
        logits: (N, C), tensor or array; None if ``features`` are blocks.
        labels: (N,) int64 class ids; None if ``features`` are blocks, or ``alpha`` is 1.
        features: (N, D) without the bias, tensor or (memory-mapped) array; or an iterable of blocks
            (features, logits, labels[, teacher]), read once.
        bias: Whether the head has a bias.
        teacher: (N, C) teacher logits, with ``alpha``.
        alpha: Weight of the divergence from the teacher, in [0, 1]; None: 0, for no teacher.
        temperature: T > 0 of the divergence.
        l2: Weight of the penalty, at least 0.
        weights: (C, D), the bias as the last column if there is one; required if ``l2`` > 0.
        tile_rows: Samples computed at a time; None chooses by cache size.
        progress: Called with (samples done, total or 0 if unknown, note).

    Returns:
        (N,), float64 if features or logits are, else float32.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there are no rows, a number is not finite, a label is out of range, or every gradient is zero
            because ``alpha`` is 1 and the teacher's logits equal the head's own.

    Source:
        Paul, Ganguli, Dziugaite, "Deep Learning on a Data Diet", 2021 (GraNd, for the last layer),
        https://arxiv.org/abs/2107.07075.
    """
    data = HeadData(features, logits, labels, teacher, bias=bias, tile_rows=tile_rows)
    loss = LossConfig.of(alpha, temperature, teacher).check()
    check_l2(l2)
    _check_weights(weights, data, l2)
    penalty = 0.0 if weights is None else l2 * float(weights.detach().double().norm())
    tile_norms = []
    for tile in data.tiles(progress=progress, note="gradient norms", deferred_checks=("features",)):
        norm = norms(tile.z, tile.y, tile.t, tile.x, bias, loss)
        if l2 > 0:
            dot = (residuals(tile.z, tile.y, tile.t, loss) * tile.z).sum(1)
            norm = (norm.square() + 2 * l2 * dot + penalty**2).clamp_min_(0).sqrt_()
        tile_norms.append(norm)
    result = torch.cat(tile_norms)
    if not bool(result.isfinite().all()):
        data.raise_nonfinite("the gradient norms", result.dtype)
    loss.check_not_all_zero(result)
    return result


def _check_weights(weights: Tensor | None, data: HeadData, l2: float) -> None:
    if weights is None:
        if l2 > 0:
            raise ShapeError("`weights` is missing: with `l2` > 0 pass the head's (C, D), the bias as last column")
        return
    check_tensor("weights", weights)
    if tuple(weights.shape) != (data.num_classes, data.dim):
        raise ShapeError(f"`weights` has shape {tuple(weights.shape)}: pass {(data.num_classes, data.dim)}")
    if not bool(weights.isfinite().all()):
        raise DataError("`weights` is not finite: correct its computation")
