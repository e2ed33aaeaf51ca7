"""Conjugate gradients for several right-hand sides in lockstep: one product with all of them at a time.

Each column has step sizes of its own, so that its solution does not depend on which others it is solved with; a column
that has converged is frozen and leaves the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.errors import ShapeError, SolveError

__all__ = ["Operator", "Solution", "conjugate_gradients", "true_residuals"]

Operator = Callable[[Tensor], Tensor]
RESTARTS = 4


class Solution(NamedTuple):
    """What a solver found.

    Attributes:
        x: (K, ...) solutions.
        residuals: (K,) float64, ||b - H x|| / ||b||, computed afresh from the solution; 0 where b is 0.
        iterations: Products with the operator that the slowest column took; 0 for a direct solver.
        method: "cholesky" or "cg".
    """

    x: Tensor
    residuals: Tensor
    iterations: int
    method: str


def conjugate_gradients(
    operator: Operator,
    b: Tensor,
    *,
    tol: float = 1e-6,
    max_iterations: int | None = None,
    precondition: Operator | None = None,
    start: Tensor | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> Solution:
    """Solves H x = b for a symmetric positive definite H that is known by its products.

    Args:
        operator: Maps (k, ...) to H times each of the k vectors, for any k up to K; includes whatever damping there is.
        b: (K, ...) right-hand sides, floating point; float64 reaches tolerances that float32 cannot.
        tol: Relative residual to reach in each column, > 0.
        max_iterations: Products at most; None: ten times the dimension, at most 10,000.
        precondition: Maps (k, ...) to an approximation of H^-1 times each, symmetric positive definite.
        start: (K, ...) first guess; None: zero.
        progress: Called with (columns converged, columns, note) after each product.

    Returns:
        The solution, with residuals computed from it, not those that the recurrence carries along.

    Raises:
        ShapeError: If ``tol`` or ``max_iterations`` is not positive, or ``b`` is empty.
        SolveError: If the tolerance is not reached, H has a direction of negative or zero curvature, or a number is
            not finite.

    Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    if not 0 < tol < math.inf:
        raise ShapeError(f"tol is {tol}: give a positive number")
    if b.dim() < 2 or b.numel() == 0:
        raise ShapeError(f"b has shape {tuple(b.shape)}: give (K, ...) with at least one vector")
    if not bool(b.isfinite().all()):
        raise SolveError("b is not finite: look for what made it")
    if max_iterations is not None and max_iterations < 1:
        raise ShapeError(f"max_iterations is {max_iterations}: give at least 1, or None")
    limit = max_iterations or min(10_000, 10 * b[0].numel() + 10)
    x = torch.zeros_like(b) if start is None else start.clone()
    used = 0
    for _ in range(RESTARTS):
        # The recurrence's residual drifts from the true one by rounding: what it calls converged is checked, and
        # columns that are not are taken up again from where they stand.
        residuals = true_residuals(operator, x, b)
        left = (~(residuals <= tol)).nonzero()[:, 0]
        if len(left) == 0 or used >= limit:
            break
        x[left], steps = _run(operator, b[left], x[left], 0.5 * tol, limit - used, precondition, progress)
        used += steps
    residuals = true_residuals(operator, x, b)
    if not bool((residuals <= tol).all()):
        worst = float(residuals.max())
        raise SolveError(
            f"conjugate gradients reached a relative residual of {worst:.1e} after {used} products, tol is {tol:.1e}: "
            "ask for less, allow more iterations, add damping (l2), or compute in float64"
        )
    return Solution(x, residuals, used, "cg")


def true_residuals(operator: Operator, x: Tensor, b: Tensor) -> Tensor:
    """||b - H x|| / ||b|| of each column, (K,) float64; 0 where both are 0."""
    size = _norms(b)
    return _norms(b - operator(x)) / torch.where(size == 0, 1, size)


def _run(
    operator: Operator,
    b: Tensor,
    x: Tensor,
    tol: float,
    limit: int,
    precondition: Operator | None,
    progress: Callable[[int, int, str], None] | None,
) -> tuple[Tensor, int]:
    """One run of the recurrence from ``x``; returns the solutions and the products taken."""
    done = x.clone()
    active = torch.arange(len(b), device=b.device)
    goal = tol * _norms(b)
    goal = torch.where(goal == 0, tol, goal)
    r = b - operator(x)
    z = r if precondition is None else precondition(r)
    p, rz = z.clone(), _dots(r, z)
    for step in range(1, limit + 1):
        q = operator(p)
        curvature = _dots(p, q)
        if not bool(curvature.isfinite().all()):
            raise SolveError(
                "the operator's products are not finite: it may be singular (add damping, l2), or its numbers too "
                "large (scale them down, or compute in float64)"
            )
        if not bool((curvature > 0).all()):
            raise SolveError(
                f"the operator has a direction of curvature {float(curvature.min()):.1e}, so it is not positive "
                "definite: add damping (l2), or use the Gauss-Newton matrix"
            )
        scale = _like(rz / curvature, x)
        x, r = x + scale * p, r - scale * q
        going = _norms(r) > goal
        if not bool(going.all()):
            done[active[~going]] = x[~going]
            active, goal, rz = active[going], goal[going], rz[going]
            x, r, p = x[going], r[going], p[going]
        if progress is not None:
            progress(len(b) - len(active), len(b), f"solve, {step} products")
        if len(active) == 0:
            return done, step
        z = r if precondition is None else precondition(r)
        previous, rz = rz, _dots(r, z)
        p = z + _like(rz / previous, x) * p
    done[active] = x
    return done, limit


def _dots(a: Tensor, b: Tensor) -> Tensor:
    products: Tensor = a.double() * b.double()
    return products.flatten(1).sum(1)


def _norms(a: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(a.double().flatten(1), dim=1)
    return norms


def _like(scalars: Tensor, x: Tensor) -> Tensor:
    return scalars.to(x.dtype).view(-1, *[1] * (x.dim() - 1))
