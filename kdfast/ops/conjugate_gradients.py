"""Conjugate gradients for several right-hand sides at once: each step multiplies all of them in one product.

Each right-hand side has its own step sizes, so its solution does not depend on which others it is solved with. One that
has converged is frozen and left out of later products.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.errors import ShapeError, SolveError
from kdfast.progress import Progress

__all__ = ["Operator", "Solution", "conjugate_gradients", "true_residuals"]

Operator = Callable[[Tensor], Tensor]
MAX_RESTARTS = 4


class Solution(NamedTuple):
    """Result of a linear solve.

    Attributes:
        x: (K, ...) solutions.
        residuals: (K,) float64, ||b - H x|| / ||b||, recomputed from the solution; 0 where b is 0.
        iterations: Products with the operator until the slowest right-hand side converged; 0 for a direct solver.
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
    progress: Progress | None = None,
) -> Solution:
    """Solve H x = b for a symmetric positive definite H given by its products with vectors.

    Args:
        operator: Maps (k, ...) to H times each of the k vectors, for any k up to K; must include any damping.
        b: (K, ...) right-hand sides, floating point; float64 reaches tolerances that float32 cannot.
        tol: Relative residual to reach for each right-hand side, > 0.
        max_iterations: Maximum number of products; None for ten times the dimension, up to 10,000.
        precondition: Maps (k, ...) to an approximation of H^-1 times each vector, symmetric positive definite.
        progress: Called with (converged, total, note) after each product; counts right-hand sides.

    Returns:
        The solution, with residuals recomputed from it instead of those tracked by the recurrence.

    Raises:
        ShapeError: If ``tol`` or ``max_iterations`` is not positive, or ``b`` is empty.
        SolveError: If the tolerance is not reached, H has a direction of negative or zero curvature, or a value is
            not finite.

    Source: Hestenes and Stiefel, "Methods of conjugate gradients for solving linear systems", 1952.
    """
    if not 0 < tol < math.inf:
        raise ShapeError(f"`tol` is {tol}: pass a positive number")
    if b.dim() < 2 or b.numel() == 0:
        raise ShapeError(f"`b` has shape {tuple(b.shape)}: pass (K, ...) with at least one vector")
    if not bool(b.isfinite().all()):
        raise SolveError("`b` is not finite: correct its computation")
    if max_iterations is not None and max_iterations < 1:
        raise ShapeError(f"`max_iterations` is {max_iterations}: pass at least 1, or None")
    limit = max_iterations or min(10_000, 10 * b[0].numel() + 10)
    x = torch.zeros_like(b)
    used = 0
    for _ in range(MAX_RESTARTS):
        # Rounding makes the recurrence's residual drift from the true one: check the true one, and restart those
        # that have not converged from their current solution.
        residuals = true_residuals(operator, x, b)
        unsolved = (~(residuals <= tol)).nonzero()[:, 0]
        if len(unsolved) == 0 or used >= limit:
            break
        x[unsolved], steps = _run(operator, b[unsolved], x[unsolved], 0.5 * tol, limit - used, precondition, progress)
        used += steps
    residuals = true_residuals(operator, x, b)
    if not bool((residuals <= tol).all()):
        worst = float(residuals.max())
        raise SolveError(
            f"conjugate gradients reached a relative residual of {worst:.1e} after {used} products, `tol` is "
            f"{tol:.1e}: increase `tol` or `max_iterations`, add damping (`l2`), or compute in float64"
        )
    return Solution(x, residuals, used, "cg")


def true_residuals(operator: Operator, x: Tensor, b: Tensor) -> Tensor:
    """Return ||b - H x|| / ||b|| of each right-hand side, (K,) float64; 0 where both are 0."""
    size = _norms(b)
    return _norms(b - operator(x)) / torch.where(size == 0, 1, size)


def _run(
    operator: Operator,
    b: Tensor,
    x: Tensor,
    tol: float,
    limit: int,
    precondition: Operator | None,
    progress: Progress | None,
) -> tuple[Tensor, int]:
    """Run the recurrence from ``x``; return the solutions and the number of products used."""
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
                "the operator's products are not finite: it may be singular (add damping, `l2`), or its values too "
                "large (scale them down, or compute in float64)"
            )
        if not bool((curvature > 0).all()):
            raise SolveError(
                f"the operator has a direction of curvature {float(curvature.min()):.1e}, so it is not positive "
                "definite: add damping (`l2`), or use the Gauss-Newton matrix"
            )
        step_size = _like(rz / curvature, x)
        x, r = x + step_size * p, r - step_size * q
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
