"""Influence of a training sample: the effect of removing it on the validation loss, or on its own loss.

Influence predicts retraining only at an optimum: bring a head that was trained by SGD there with ``head_newton``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.float32 import full_float32
from kdfast.ops.softmax_head.data import Features, HeadData, compute_logits
from kdfast.ops.softmax_head.dense_hessian import append_bias
from kdfast.ops.softmax_head.kronecker import kronecker_factors, kronecker_self_influence
from kdfast.ops.softmax_head.leave_one_out import LeaveOneOut
from kdfast.ops.softmax_head.residuals import LossConfig, residuals
from kdfast.ops.softmax_head.validation import Array, check_positive_l2
from kdfast.progress import Progress

__all__ = ["head_influence", "head_self_influence"]


@full_float32()
def head_influence(
    features: Features,
    logits: Array | None,
    labels: Array | None,
    val_features: Features,
    val_logits: Array | None,
    val_labels: Array | None,
    *,
    l2: float,
    bias: bool = True,
    corrected: bool = False,
    teacher: Array | None = None,
    alpha: float | None = None,
    temperature: float = 4.0,
    tol: float = 1e-6,
    method: str = "auto",
    max_iterations: int | None = None,
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Predict how much the mean validation loss rises if a training sample is removed: + g_val^T H^-1 g_i / N.

    Positive: the sample is helpful. One solve, for the mean validation gradient, serves all N samples. The validation
    loss is the cross-entropy; ``teacher``, ``alpha`` and ``temperature`` define the training loss.

    The other samples keep the weight 1/N, so that the penalty weighs as much against each of them as before: to retrain
    without the sample, pass ``l2 * N / (N - 1)`` to ``head_newton``. With the same ``l2``, all effects shift by nearly
    the same.

    Args:
        features: (N, D) of the training samples, without the bias; tensor, (memory-mapped) array, or a re-iterable of
            blocks (features, logits, labels[, teacher]).
        logits: (N, C) of the head on them; None if ``features`` are blocks.
        labels: (N,) int64; None if ``features`` are blocks, or ``alpha`` is 1.
        val_features: (M, D) of the validation samples, or blocks.
        val_logits: (M, C), or None with blocks.
        val_labels: (M,) int64, or None with blocks.
        l2: Weight of the penalty (l2 / 2) ||W||^2, > 0.
        bias: Whether the head has a bias; the penalty includes it.
        corrected: Whether to add the second-order terms in 1/N: the sample's leverage and the curvature of both losses.
            Pass True to predict the size of effects closely, for example of mislabeled samples; False suffices for
            ranking. It needs H^-1 as a matrix, so up to 10,000 weights unless ``method`` is "cholesky".
        teacher: (N, C) teacher logits of the training samples, with ``alpha``.
        alpha: Weight of the divergence from the teacher in the training loss; None: 0, for no teacher. For a head equal
            to the teacher the divergence's gradient is zero, so with alpha = 1 every influence is, too: use hard
            labels, or evaluate the divergence at the weights of a proxy.
        temperature: T > 0 of the divergence.
        tol: Relative residual required of the solve.
        method: "auto", "cholesky" or "cg".
        max_iterations: Limit on the Hessian products of conjugate gradients.
        tile_rows: Samples computed at a time; None chooses by cache size.
        progress: Called with (done, total or 0 if unknown, note).

    Returns:
        (N,), float64 if features or logits are, else float32.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there are no rows, a number is not finite, a label is out of range, or all labels are one class.
        SolveError: If the tolerance is not reached.

    Source:
        Koh and Liang, "Understanding black-box predictions via influence functions", 2017,
        https://arxiv.org/abs/1703.04730.
    """
    data = HeadData(features, logits, labels, teacher, bias=bias, tile_rows=tile_rows)
    val = HeadData(val_features, val_logits, val_labels, bias=bias, prefix="val_", tile_rows=tile_rows)
    if (val.num_classes, val.dim, val.device) != (data.num_classes, data.dim, data.device):
        raise ShapeError(
            f"`val_features` and `val_logits` have {val.num_features} features and {val.num_classes} classes on "
            f"{val.device}, the training samples {data.num_features} and {data.num_classes} on {data.device}: pass "
            "both of the same head"
        )
    removal = LeaveOneOut(
        data, l2, LossConfig.of(alpha, temperature, teacher), corrected, tol, method, max_iterations, progress
    )
    u = removal.solver.solve(mean_gradient(val, LossConfig())[None]).x[0]
    second_order = removal.second_order_matrix(val, u) if corrected else None
    effects = removal.allocate()
    for tile in data.tiles(data.num_classes * data.dim, torch.float64, progress, "influence"):
        weighted = removal.weighted_residuals(tile)
        tile_effects = effects[tile.start : tile.start + len(tile.x)]
        torch.sum(compute_logits(tile.x, u, bias) * weighted, 1, out=tile_effects)
        if second_order is not None:
            tile_effects += removal.curvature_term(tile, weighted, second_order)
    return removal.divide_by_n(effects)


@full_float32()
def head_self_influence(
    features: Features,
    logits: Array | None,
    labels: Array | None,
    *,
    l2: float,
    bias: bool = True,
    corrected: bool = False,
    teacher: Array | None = None,
    alpha: float | None = None,
    temperature: float = 4.0,
    tol: float = 1e-6,
    method: str = "auto",
    max_iterations: int | None = None,
    tile_rows: int | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Predict how much a sample's own loss rises if it is removed from training: g_i^T H^-1 g_i / N, never negative.

    Large for samples that the head memorizes, such as mislabeled ones.

    Args:
        features: As in ``head_influence``, and likewise for all others.
        logits: (N, C), or None with blocks.
        labels: (N,) int64, or None with blocks.
        l2: Weight of the penalty, > 0.
        bias: Whether the head has a bias.
        corrected: Whether to account for the sample's own curvature. Pass True to predict the size of effects closely;
            False suffices for ranking.
        teacher: (N, C) teacher logits, with ``alpha``.
        alpha: Weight of the divergence from the teacher; None: 0, for no teacher.
        temperature: T > 0 of the divergence.
        tol: Relative residual required of conjugate gradients. They need one solve per sample: use them only for few
            samples, and Cholesky wherever the Hessian fits as a matrix.
        method: "auto", "cholesky" or "cg"; or "kronecker" for the approximate Hessian of ``kronecker_factors``, which
            takes two passes over the data for any number of weights.
        max_iterations: Limit on the Hessian products of conjugate gradients.
        tile_rows: Samples computed at a time; None chooses by cache size.
        reduce: Adds up a tensor over processes, such as ``torch.distributed.all_reduce`` does, each of which passes
            some of the samples and gets their effects; None: all samples are passed. Not with "cg".
        progress: Called with (done, total or 0 if unknown, note).

    Returns:
        (N,), float64 if features or logits are, else float32.

    Raises:
        ShapeError, DataError, SolveError: As ``head_influence``.

    Source:
        Koh and Liang, 2017, section 5.4, https://arxiv.org/abs/1703.04730.
    """
    data = HeadData(features, logits, labels, teacher, bias=bias, tile_rows=tile_rows)
    data.reduce = reduce
    if method == "kronecker":
        return _approximate(data, l2, LossConfig.of(alpha, temperature, teacher).check(), corrected, progress)
    removal = LeaveOneOut(
        data, l2, LossConfig.of(alpha, temperature, teacher), corrected, tol, method, max_iterations, progress
    )
    if reduce is not None and (removal.solver.method == "cg" or corrected):
        raise ShapeError("`reduce` shares the Hessian as a matrix: pass corrected=False and method='cholesky'")
    effects = removal.allocate()
    for tile in data.tiles(data.num_classes * data.dim, torch.float64, progress, "self-influence"):
        effects[tile.start : tile.start + len(tile.x)] = removal.self_effects(tile)
    return removal.divide_by_n(effects)


def _approximate(data: HeadData, l2: float, loss: LossConfig, corrected: bool, progress: Progress | None) -> Tensor:
    if corrected:
        raise ShapeError("`corrected` needs the exact Hessian: pass corrected=False, or another `method`")
    check_positive_l2(l2)
    data.require_multiple_passes("the Kronecker approximation")
    factors = kronecker_factors(data, l2, loss, progress, "curvature")
    if loss.alpha < 1:
        data.require_two_classes()
    effects = kronecker_self_influence(data, factors, loss, progress)
    loss.check_not_all_zero(effects)
    return (effects / data.count_rows()).to(data.dtype)


def mean_gradient(data: HeadData, loss: LossConfig) -> Tensor:
    """Return the mean over samples of r h^T, (C, D) in float64."""
    total = torch.zeros(data.num_classes, data.dim, dtype=torch.float64, device=data.device)
    rows = 0
    for tile in data.tiles(0, torch.float64):
        total.addmm_(residuals(tile.z, tile.y, tile.t, loss).mT, append_bias(tile, data))
        rows += len(tile.x)
    return total / rows
