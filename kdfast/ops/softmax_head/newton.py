"""Newton's method on a softmax head: moves trained weights to their optimum on fixed features."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError, SolveError
from kdfast.ops.float32 import full_float32
from kdfast.ops.softmax_head.data import Features, HeadData, compute_logits
from kdfast.ops.softmax_head.dense_hessian import append_bias
from kdfast.ops.softmax_head.kronecker import FeatureFactor, feature_factor
from kdfast.ops.softmax_head.residuals import LossConfig, residuals
from kdfast.ops.softmax_head.solve import FLOAT32_TOL, HeadSolver, choose_method, solve_in_float32
from kdfast.ops.softmax_head.validation import Array, check_positive_l2, check_tensor, check_tol
from kdfast.progress import Progress

__all__ = ["head_logits", "head_newton"]

MAX_STEPS = 100
MAX_HALVINGS = 40


@full_float32()
def head_newton(
    features: Features,
    labels: Array | None,
    *,
    l2: float,
    init: Tensor | None = None,
    tol: float = 1e-8,
    bias: bool = True,
    teacher: Array | None = None,
    alpha: float | None = None,
    temperature: float = 4.0,
    classes: int | None = None,
    method: str = "auto",
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Minimize F = (1/N) sum of losses + (l2 / 2) ||W||^2 until ||grad F|| <= ``tol``, in float64.

    Influence and leave-one-out predict retraining only at an optimum. A head trained by SGD, with augmentation, is not
    at the optimum of its cached features. The penalty includes the bias, so the optimum is unique.

    Args:
        features: (N, D') without the bias, tensor or (memory-mapped) array; or a re-iterable of blocks
            (features, None, labels[, teacher]).
        labels: (N,) int64; None if ``features`` are blocks, or ``alpha`` is 1.
        l2: Weight of the penalty, > 0.
        init: (C, D) initial weights; with a bias, D = D' + 1 and the bias is the last column. None: zero.
        tol: Euclidean norm of the gradient to reach.
        bias: Whether the head has a bias.
        teacher: (N, C) teacher logits, with ``alpha``.
        alpha: Weight of the divergence from the teacher; None: 0, for no teacher.
        temperature: T > 0 of the divergence.
        classes: C; None: that of ``init``, else of the teacher, else the largest label plus one.
        method: Method of the solves: "auto", "cholesky" or "cg".
        tile_rows: Samples computed at a time; None chooses by cache size.
        progress: Called with (steps done, 0, note).

    Returns:
        (C, D) float64.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there are no rows, a number is not finite, a label is out of range, or all labels are one class.
        SolveError: If the gradient does not reach ``tol``; float64 allows about 1e-16 times the size of the features.
    """
    check_positive_l2(l2)
    check_tol(tol)
    loss = LossConfig.of(alpha, temperature, teacher).check()
    data = HeadData(features, None, labels, teacher, bias=bias, tile_rows=tile_rows, needs_logits=False)
    data.require_multiple_passes("Newton's method")
    w = _initial_weights(data, init, classes)
    data = data.with_weights(w)
    method, factor = choose_method(method, data), None
    value, gradient = _objective(data, w, l2, loss)
    if loss.alpha < 1:
        data.require_two_classes()
    for step in range(MAX_STEPS):
        size = float(gradient.norm())
        if progress is not None:
            progress(step, 0, f"Newton, gradient {size:.1e}")
        if size <= tol:
            return w
        if factor is None and method == "cg":
            factor = feature_factor(data)
        direction = _direction(data, w, gradient, l2, loss, method, factor)
        w, value, gradient = _line_search(data, w, direction, value, gradient, l2, loss)
    raise SolveError(
        f"Newton's method reached a gradient norm of {float(gradient.norm()):.1e} in {MAX_STEPS} steps, `tol` is "
        f"{tol:.1e}: increase `l2` or `tol`, or scale the features to similar size"
    )


@full_float32()
def head_logits(features: Tensor, weights: Tensor) -> Tensor:
    """Return the logits (N, C) of features (N, D') for weights (C, D'), or (C, D' + 1) with the bias as last column.

    Raises:
        ShapeError: If the types, sizes or devices do not fit.
    """
    for name, x in (("features", features), ("weights", weights)):
        check_tensor(name, x)
    if features.device != weights.device:
        raise ShapeError(f"`features` is on {features.device}, `weights` on {weights.device}: move them to one device")
    extra = weights.shape[-1] - features.shape[-1] if weights.dim() == features.dim() == 2 else -1
    if extra not in (0, 1):
        raise ShapeError(
            f"`features` has shape {tuple(features.shape)} and `weights` {tuple(weights.shape)}: pass (N, D') and "
            "either (C, D') or (C, D' + 1)"
        )
    return compute_logits(features.to(weights.dtype), weights, extra == 1)


def _initial_weights(data: HeadData, init: Tensor | None, classes: int | None) -> Tensor:
    if init is not None:
        check_tensor("init", init)
        if init.dim() != 2 or init.shape[1] != data.dim or (classes is not None and init.shape[0] != classes):
            raise ShapeError(f"`init` has shape {tuple(init.shape)}: pass ({classes or 'C'}, {data.dim})")
        if init.device != data.device:
            raise ShapeError(f"`init` is on {init.device}, `features` on {data.device}: move them to one device")
        if not bool(init.isfinite().all()):
            raise DataError("`init` is not finite: correct its computation, or omit it")
        return init.detach().double()
    if classes is None:
        classes = data.infer_num_classes()
    try:
        return torch.zeros(classes, data.dim, dtype=torch.float64, device=data.device)
    except (RuntimeError, TypeError) as error:
        raise DataError(
            f"the weights of {classes} classes do not fit into memory: correct the largest of `labels`, or pass "
            "`classes`"
        ) from error


def _direction(
    data: HeadData,
    w: Tensor,
    gradient: Tensor,
    l2: float,
    loss: LossConfig,
    method: str,
    factor: FeatureFactor | None,
) -> Tensor:
    """Return H^-1 times the gradient, the more exact the smaller the gradient."""
    tol = min(0.1, max(1e-10, float(gradient.norm())))
    exact = HeadSolver(data.with_weights(w), l2, loss, tol=tol, method=method, features=factor)
    if method == "cg" and tol >= FLOAT32_TOL:
        # With kept logits, a product in float32 takes a third of the time.
        return solve_in_float32(exact, data.with_kept_logits(w), gradient)
    return exact.solve(gradient[None]).x[0]


def _objective(data: HeadData, w: Tensor, l2: float, loss: LossConfig) -> tuple[float, Tensor]:
    """Return F and its gradient (C, D) at ``w``."""
    total = torch.zeros((), dtype=torch.float64, device=w.device)
    gradient = torch.zeros_like(w)
    rows = 0
    for tile in data.with_weights(w).tiles(data.num_classes, torch.float64):
        gradient.addmm_(residuals(tile.z, tile.y, tile.t, loss).mT, append_bias(tile, data))
        if loss.alpha < 1 and tile.y is not None:
            total += (1 - loss.alpha) * torch.nn.functional.cross_entropy(tile.z, tile.y, reduction="sum")
        if loss.alpha > 0 and tile.t is not None:
            z, t = (v.div(loss.temperature).log_softmax(1) for v in (tile.z, tile.t))
            total += loss.alpha * loss.temperature**2 * (t.exp() * (t - z)).sum()
        rows += len(tile.x)
    return float(total / rows + l2 / 2 * w.square().sum()), gradient.div_(rows).add_(w, alpha=l2)


def _line_search(
    data: HeadData, w: Tensor, direction: Tensor, value: float, gradient: Tensor, l2: float, loss: LossConfig
) -> tuple[Tensor, float, Tensor]:
    """Take a step along -``direction`` that lowers F enough or, where rounding makes F flat, lowers the gradient."""
    slope = float((gradient * direction).sum())
    size = float(gradient.norm())
    scale = 1.0
    for _ in range(MAX_HALVINGS):
        new_w = w - scale * direction
        new_value, new_gradient = _objective(data, new_w, l2, loss)
        flat = slope * scale < 1e-12 * max(1.0, abs(value)) and float(new_gradient.norm()) < size
        if flat or new_value <= value - 1e-4 * scale * slope:
            return new_w, new_value, new_gradient
        scale /= 2
    raise SolveError(
        f"Newton's method cannot lower a gradient norm of {size:.1e}, which is at the rounding error of float64: "
        "increase `tol`, or scale the features to similar size"
    )
