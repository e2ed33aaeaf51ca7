"""Newton's method on a softmax head: from where training stopped to its optimum on fixed features."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError, SolveError
from kdfast.ops.softmax_head.data import Features, HeadData, Progress, linear
from kdfast.ops.softmax_head.dense_hessian import with_bias
from kdfast.ops.softmax_head.residuals import Target, residuals
from kdfast.ops.softmax_head.solve import HeadSolver, check_l2
from kdfast.ops.softmax_head.validation import Array, check_tensor

__all__ = ["head_logits", "head_newton"]

STEPS = 100
HALVINGS = 40


def head_newton(
    features: Features,
    labels: Array | None,
    *,
    l2: float,
    init: Tensor | None = None,
    tol: float = 1e-8,
    bias: bool = True,
    teacher: Array | None = None,
    alpha: float = 0.0,
    temperature: float = 4.0,
    classes: int | None = None,
    method: str = "auto",
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Minimises F = (1/N) sum of losses + (l2 / 2) ||W||^2 until ||grad F|| <= ``tol``, in float64.

    A head that was trained by SGD, with augmentation, is not at the optimum of its cached features; influence and
    leave-one-out say what retraining does only there. The penalty includes the bias, so the optimum is unique.

    Args:
        features: (N, D') without the bias, tensor or (memory-mapped) array; or a re-iterable of blocks
            (features, None, labels[, teacher]).
        labels: (N,) int64; None when ``features`` are blocks, or ``alpha`` is 1.
        l2: Weight of the penalty, > 0.
        init: (C, D) weights to start from, D = D' + 1 with a bias, whose column is the last; None: zero.
        tol: Euclidean norm of the gradient to reach.
        bias: Whether the head has a bias.
        teacher: (N, C) teacher logits, for ``alpha`` > 0.
        alpha: Weight of the divergence from the teacher.
        temperature: T > 0 of the divergence.
        classes: C; None: of ``init``, else of the teacher, else the largest label plus one.
        method: Of the solves: "auto", "cholesky" or "cg".
        tile_rows: Samples computed at a time.
        progress: Called with (done, in all or 0, note).

    Returns:
        (C, D) float64.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there is no row, a number is not finite, a label is out of range, or all labels are one class.
        SolveError: If the gradient does not get that small; float64's floor is about 1e-16 times the features' size.
    """
    check_l2(l2)
    if not 0 < tol < math.inf:
        raise ShapeError(f"tol is {tol}: give a positive number")
    target = Target(alpha, temperature).check()
    data = HeadData(features, None, labels, teacher, bias=bias, tile_rows=tile_rows, needs_logits=False)
    data.require_many("Newton's method")
    w = _start(data, init, classes)
    data = data.at(w)
    value, gradient = _objective(data, w, l2, target)
    if alpha < 1:
        data.require_two_classes()
    for step in range(STEPS):
        size = float(gradient.norm())
        if progress is not None:
            progress(step, 0, f"Newton, gradient {size:.1e}")
        if size <= tol:
            return w
        solver = HeadSolver(data.at(w), l2, target, tol=min(0.1, max(1e-10, size)), method=method)
        w, value, gradient = _line_search(data, w, solver.solve(gradient[None]).x[0], value, gradient, l2, target)
    raise SolveError(
        f"Newton's method reached a gradient norm of {float(gradient.norm()):.1e} in {STEPS} steps, tol is {tol:.1e}: "
        "use a larger l2, scale the features to a similar size, or ask for less"
    )


def head_logits(features: Tensor, weights: Tensor) -> Tensor:
    """Logits (N, C) of features (N, D') under weights (C, D') or, the bias as last column, (C, D' + 1).

    Raises:
        ShapeError: If the sizes do not fit.
    """
    extra = weights.shape[-1] - features.shape[-1] if weights.dim() == features.dim() == 2 else -1
    if extra not in (0, 1):
        raise ShapeError(
            f"features have shape {tuple(features.shape)} and weights {tuple(weights.shape)}: "
            "(N, D') and (C, D') or (C, D' + 1) are needed"
        )
    return linear(features.to(weights.dtype), weights, extra == 1)


def _start(data: HeadData, init: Tensor | None, classes: int | None) -> Tensor:
    if init is not None:
        check_tensor("init", init)
        if init.dim() != 2 or init.shape[1] != data.dim or (classes is not None and init.shape[0] != classes):
            raise ShapeError(f"init has shape {tuple(init.shape)}: ({classes or 'C'}, {data.dim}) is needed")
        if init.device != data.device:
            raise ShapeError(f"init is on {init.device}, the features are on {data.device}: move them to one device")
        if not bool(init.isfinite().all()):
            raise DataError("init is not finite: look for what made it, or leave it out")
        return init.detach().double()
    if classes is None:
        classes = data.count_classes()
    return torch.zeros(classes, data.dim, dtype=torch.float64, device=data.device)


def _objective(data: HeadData, w: Tensor, l2: float, target: Target) -> tuple[float, Tensor]:
    """F and its gradient (C, D) at ``w``."""
    total = torch.zeros((), dtype=torch.float64, device=w.device)
    gradient = torch.zeros_like(w)
    rows = 0
    for tile in data.at(w).tiles(data.classes, torch.float64):
        gradient.addmm_(residuals(tile.z, tile.y, tile.t, target).mT, with_bias(tile, data))
        if target.alpha < 1 and tile.y is not None:
            total += (1 - target.alpha) * torch.nn.functional.cross_entropy(tile.z, tile.y, reduction="sum")
        if target.alpha > 0 and tile.t is not None:
            z, t = (v.div(target.temperature).log_softmax(1) for v in (tile.z, tile.t))
            total += target.alpha * target.temperature**2 * (t.exp() * (t - z)).sum()
        rows += len(tile.x)
    return float(total / rows + l2 / 2 * w.square().sum()), gradient.div_(rows).add_(w, alpha=l2)


def _line_search(
    data: HeadData, w: Tensor, direction: Tensor, value: float, gradient: Tensor, l2: float, target: Target
) -> tuple[Tensor, float, Tensor]:
    """A step along -``direction`` that lowers F enough, or, where F is flat to rounding, the gradient."""
    slope = float((gradient * direction).sum())
    size = float(gradient.norm())
    scale = 1.0
    for _ in range(HALVINGS):
        there = w - scale * direction
        new_value, new_gradient = _objective(data, there, l2, target)
        flat = slope * scale < 1e-12 * max(1.0, abs(value)) and float(new_gradient.norm()) < size
        if flat or new_value <= value - 1e-4 * scale * slope:
            return there, new_value, new_gradient
        scale /= 2
    raise SolveError(
        f"Newton's method cannot lower a gradient norm of {size:.1e}: float64's rounding is reached. Ask for a larger "
        "tol, or scale the features to a similar size"
    )
