"""What removing a training sample does: to the validation loss, to the sample's own loss, to the head's weights.

For F = (1/N) sum of losses + (l2 / 2) ||W||^2, minimised, with Hessian H and a sample's gradient g_i, removing sample i
(dropping its term, 1/N kept) moves the weights by H^-1 g_i / N to first order. Counting that the sample's own curvature
leaves too gives, with J_i = I (x) h_i^T, M_i = J_i H^-1 J_i^T and the sample's residual r_i and curvature S_i, the
exact Newton step

    (1/N) H^-1 J_i^T (I - S_i M_i / N)^-1 r_i.

Both say something about retraining only at an optimum: polish a head that was trained by SGD with ``head_newton``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.softmax_head.data import Features, HeadData, Progress, linear
from kdfast.ops.softmax_head.dense_hessian import with_bias
from kdfast.ops.softmax_head.leave_one_out import Removal
from kdfast.ops.softmax_head.residuals import Target, residuals
from kdfast.ops.softmax_head.validation import Array, check_tensor

__all__ = ["head_influence", "head_leave_one_out", "head_self_influence"]


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
    alpha: float = 0.0,
    temperature: float = 4.0,
    tol: float = 1e-6,
    method: str = "auto",
    max_iterations: int | None = None,
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """How much the mean validation loss rises when a training sample is removed: + g_val^T H^-1 g_i / N.

    Positive: the sample is helpful. One solve, for the mean validation gradient, whatever N is. The validation loss is
    the cross-entropy; ``teacher``, ``alpha`` and ``temperature`` belong to the training loss.

    Args:
        features: (N, D) of the training samples, without the bias; tensor, (memory-mapped) array, or a re-iterable of
            blocks (features, logits, labels[, teacher]).
        logits: (N, C) of the head on them; None when ``features`` are blocks.
        labels: (N,) int64; None when ``features`` are blocks, or ``alpha`` is 1.
        val_features: (M, D) of the validation samples, or blocks.
        val_logits: (M, C), or None with blocks.
        val_labels: (M,) int64, or None with blocks.
        l2: Weight of the penalty (l2 / 2) ||W||^2, > 0.
        bias: Whether the head has a bias; the penalty includes it.
        corrected: Whether the effect is taken to second order in 1/N: with the sample's own curvature (leverage), the
            validation loss's, and the change of the training loss's along the step. Nearer to true retraining; needs
            H^-1 as a matrix, so C D up to 10,000 unless ``method`` is "cholesky".
        teacher: (N, C) teacher logits of the training samples, for ``alpha`` > 0.
        alpha: Weight of the divergence from the teacher in the training loss. At a head equal to the teacher the
            divergence's gradient is zero, so with alpha = 1 every influence is too: score with hard labels there, or
            with the divergence at the parameters of a proxy.
        temperature: T > 0 of the divergence.
        tol: Relative residual of the solve.
        method: "auto", "cholesky" or "cg".
        max_iterations: Products at most of conjugate gradients.
        tile_rows: Samples computed at a time.
        progress: Called with (done, in all or 0, note).

    Returns:
        (N,), float64 when features or logits are, else float32.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there is no row, a number is not finite, a label is out of range, or all labels are one class.
        SolveError: If the tolerance is not reached.

    Source: Koh and Liang, "Understanding black-box predictions via influence functions", 2017,
    https://arxiv.org/abs/1703.04730.
    """
    data = HeadData(features, logits, labels, teacher, bias=bias, tile_rows=tile_rows)
    val = HeadData(val_features, val_logits, val_labels, bias=bias, prefix="val_", tile_rows=tile_rows)
    if (val.classes, val.dim, val.device) != (data.classes, data.dim, data.device):
        raise ShapeError(
            f"val_features and val_logits have {val.features} features and {val.classes} classes on {val.device}, the "
            f"training samples {data.features} and {data.classes} on {data.device}: they must be the same head's"
        )
    removal = Removal(data, l2, Target(alpha, temperature), corrected, tol, method, max_iterations, progress)
    u = removal.solver.solve(mean_gradient(val, Target())[None]).x[0]
    curvature = removal.second_order(val, u) if corrected else None
    found = removal.empty()
    for tile in data.tiles(data.classes * data.dim, torch.float64, progress, "influence"):
        pulls = removal.pulls(tile)
        here = found[tile.start : tile.start + len(tile.x)]
        torch.sum(linear(tile.x, u, bias) * pulls, 1, out=here)
        if curvature is not None:
            here += removal.bend(tile, pulls, curvature)
    return removal.result(found)


def head_self_influence(
    features: Features,
    logits: Array | None,
    labels: Array | None,
    *,
    l2: float,
    bias: bool = True,
    corrected: bool = False,
    teacher: Array | None = None,
    alpha: float = 0.0,
    temperature: float = 4.0,
    tol: float = 1e-6,
    method: str = "auto",
    max_iterations: int | None = None,
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """How much a sample's own loss rises when it is removed from training: g_i^T H^-1 g_i / N, never negative.

    Large for samples that the head had to memorise, such as mislabelled ones.

    Args:
        features: As in ``head_influence``, and so on for all others.
        logits: (N, C), or None with blocks.
        labels: (N,) int64, or None with blocks.
        l2: Weight of the penalty, > 0.
        bias: Whether the head has a bias.
        corrected: Whether the sample's own curvature is counted.
        teacher: (N, C) teacher logits, for ``alpha`` > 0.
        alpha: Weight of the divergence from the teacher.
        temperature: T > 0 of the divergence.
        tol: Relative residual of the solves that conjugate gradients do: one a sample, so this is for heads whose
            Hessian fits as a matrix, or for few samples.
        method: "auto", "cholesky" or "cg".
        max_iterations: Products at most of conjugate gradients.
        tile_rows: Samples computed at a time.
        progress: Called with (done, in all or 0, note).

    Returns:
        (N,), float64 when features or logits are, else float32.

    Raises:
        ShapeError, DataError, SolveError: As ``head_influence``.

    Source: Koh and Liang, 2017, section 5.4, https://arxiv.org/abs/1703.04730.
    """
    data = HeadData(features, logits, labels, teacher, bias=bias, tile_rows=tile_rows)
    removal = Removal(data, l2, Target(alpha, temperature), corrected, tol, method, max_iterations, progress)
    found = removal.empty()
    for tile in data.tiles(data.classes * data.dim, torch.float64, progress, "self-influence"):
        found[tile.start : tile.start + len(tile.x)] = removal.own_effect(tile)
    return removal.result(found)


def head_leave_one_out(
    features: Features,
    logits: Array | None,
    labels: Array | None,
    rows: Tensor,
    *,
    l2: float,
    bias: bool = True,
    corrected: bool = True,
    teacher: Array | None = None,
    alpha: float = 0.0,
    temperature: float = 4.0,
    tol: float = 1e-6,
    method: str = "auto",
    max_iterations: int | None = None,
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Change of the head's weights when a sample is removed, for each of some samples.

    Args:
        features: As in ``head_influence``, and so on for all others.
        logits: (N, C), or None with blocks.
        labels: (N,) int64, or None with blocks.
        rows: (n,) int64, the samples to remove, each on its own.
        l2: Weight of the penalty, > 0.
        bias: Whether the head has a bias.
        corrected: Whether the sample's own curvature is counted.
        teacher: (N, C) teacher logits, for ``alpha`` > 0.
        alpha: Weight of the divergence from the teacher.
        temperature: T > 0 of the divergence.
        tol: Relative residual of the solve.
        method: "auto", "cholesky" or "cg".
        max_iterations: Products at most of conjugate gradients.
        tile_rows: Samples computed at a time.
        progress: Called with (done, in all or 0, note).

    Returns:
        (n, C, D), D counting the bias; add to the weights for those of the head without the sample. float64 when
        features or logits are, else float32.

    Raises:
        ShapeError, DataError, SolveError: As ``head_influence``.
        IndexError: If a row lies outside [0, N).
    """
    data = HeadData(features, logits, labels, teacher, bias=bias, tile_rows=tile_rows)
    check_tensor("rows", rows)
    if rows.dim() != 1 or rows.dtype != torch.int64 or len(rows) == 0:
        raise ShapeError(f"rows are {rows.dtype} of shape {tuple(rows.shape)}: give (n,) int64 sample numbers")
    removal = Removal(data, l2, Target(alpha, temperature), corrected, tol, method, max_iterations, progress)
    if bool((rows < 0).any()) or bool((rows >= data.total).any()):
        raise IndexError(f"rows must lie in [0, {data.total}), the number of samples")
    wanted = rows.to(data.device)
    right = torch.zeros(len(rows), data.classes, data.dim, dtype=torch.float64, device=data.device)
    for tile in data.tiles(data.dim, torch.float64, progress, "leave one out"):
        here = ((wanted >= tile.start) & (wanted < tile.start + len(tile.x))).nonzero()[:, 0]
        if len(here):
            few = tile.pick(wanted[here] - tile.start)
            right[here] = removal.pulls(few)[:, :, None] * with_bias(few, data)[:, None]
    return removal.result(removal.solver.solve(right).x)


def mean_gradient(data: HeadData, target: Target) -> Tensor:
    """Mean over the samples of r h^T, (C, D) in float64."""
    total = torch.zeros(data.classes, data.dim, dtype=torch.float64, device=data.device)
    rows = 0
    for tile in data.tiles(0, torch.float64):
        total.addmm_(residuals(tile.z, tile.y, tile.t, target).mT, with_bias(tile, data))
        rows += len(tile.x)
    return total / rows
