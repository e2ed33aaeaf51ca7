"""Solves with a softmax head's Hessian: by Cholesky while it fits, by preconditioned conjugate gradients above."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError, SolveError
from kdfast.ops.conjugate_gradients import Operator, Solution, conjugate_gradients, true_residuals
from kdfast.ops.softmax_head.data import Features, HeadData, Progress
from kdfast.ops.softmax_head.dense_hessian import hessian, with_bias
from kdfast.ops.softmax_head.hvp import check_vectors, hessian_products
from kdfast.ops.softmax_head.residuals import Target, probabilities
from kdfast.ops.softmax_head.validation import Array

__all__ = ["CHOLESKY_LIMIT", "HeadSolver", "head_solve"]

CHOLESKY_LIMIT = 10_000  # weights C * D up to which the Hessian is made a matrix: 0.8 GB in float64


def head_solve(
    features: Features,
    logits: Array | None,
    b: Tensor,
    *,
    l2: float,
    bias: bool = True,
    tol: float = 1e-6,
    alpha: float = 0.0,
    temperature: float = 4.0,
    method: str = "auto",
    max_iterations: int | None = None,
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Solves H x = b for the Hessian of ``head_hvp`` and K right-hand sides.

    ``HeadSolver`` does the same, keeps what it prepared for further calls, and reports the residuals it achieved.

    Args:
        features: (N, D') without the bias, tensor or (memory-mapped) array; or a re-iterable of blocks
            (features, logits).
        logits: (N, C) of the head; None when ``features`` are blocks.
        b: (C, D) or (K, C, D), D = D' + 1 with a bias, whose column is the last.
        l2: Weight of the penalty (l2 / 2) ||W||^2, > 0: without it the Hessian is singular, since adding the same
            vector to the weights of every class changes no probability.
        bias: Whether the head has a bias.
        tol: Relative residual ||b - H x|| / ||b|| to reach for each right-hand side.
        alpha: Weight of the divergence from a teacher in the loss.
        temperature: T > 0 of the divergence.
        method: "auto", "cholesky" or "cg"; "auto" takes Cholesky up to 10,000 weights.
        max_iterations: Products at most of conjugate gradients.
        tile_rows: Samples computed at a time; None chooses by the size of a cache.
        progress: Called with (done, in all or 0, note).

    Returns:
        float64 in the shape of ``b``: rounded to a narrower type, the solution would miss the tolerance.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there is no row, a number is not finite, or the data can be read only once.
        SolveError: If the tolerance is not reached.
    """
    data = HeadData(features, logits, bias=bias, tile_rows=tile_rows)
    target = Target(alpha, temperature).check()
    solver = HeadSolver(data, l2, target, tol=tol, method=method, max_iterations=max_iterations, progress=progress)
    return solver.solve(check_vectors("b", b, data)).x.reshape(b.shape)


class HeadSolver:
    """The Hessian of a softmax head, ready to solve with.

    Args:
        data: The training samples, with the logits of the head.
        l2: Weight of the penalty, > 0.
        target: The loss.
        tol: Relative residual to reach.
        method: "auto", "cholesky" or "cg".
        max_iterations: Products at most of conjugate gradients.
        progress: Called with (done, in all or 0, note).

    Raises:
        ShapeError: If an option does not fit.
        DataError: If the data can be read only once.
        SolveError: If the Hessian is not positive definite in float64.
    """

    def __init__(
        self,
        data: HeadData,
        l2: float,
        target: Target | None = None,
        *,
        tol: float = 1e-6,
        method: str = "auto",
        max_iterations: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_l2(l2)
        if not 0 < tol < math.inf:
            raise ShapeError(f"tol is {tol}: give a positive number")
        if method not in ("auto", "cholesky", "cg"):
            raise ShapeError(f"method is {method!r}: give 'auto', 'cholesky' or 'cg'")
        data.require_many("a solve")
        self.data, self.l2, self.target, self.tol = data, l2, target or Target(), tol
        self.max_iterations, self.progress = max_iterations, progress
        if method == "auto":
            method = "cholesky" if data.classes * data.dim <= CHOLESKY_LIMIT else "cg"
        self.method = method

    def operator(self, v: Tensor) -> Tensor:
        """H V for (K, C, D) float64."""
        return hessian_products(self.data, v, self.l2, self.target)

    def prepare(self) -> None:
        """Reads the data once for what every solve needs; otherwise the first solve does."""
        _ = self.factor if self.method == "cholesky" else self.preconditioner

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor (C D, C D), float64."""
        matrix = hessian(self.data, self.l2, self.target, self.progress)
        if not bool(matrix.diagonal().isfinite().all()):
            raise DataError("the Hessian overflows float64: scale the features down")
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            raise SolveError(
                f"the Hessian is not positive definite in float64 with l2 = {self.l2}: use a larger l2, or scale the "
                "features to a similar size"
            )
        return factor

    @cached_property
    def inverse(self) -> Tensor:
        """H^-1 (C D, C D), float64."""
        return torch.cholesky_inverse(self.factor)

    @cached_property
    def preconditioner(self) -> Operator:
        """The inverse of mean(S) (x) X^T X / N + l2, by the eigenvectors of the two factors."""
        data = self.data
        s = torch.zeros(data.classes, data.classes, dtype=torch.float64, device=data.device)
        g = torch.zeros(data.dim, data.dim, dtype=torch.float64, device=data.device)
        rows = 0
        for tile in data.tiles(data.classes, torch.float64, self.progress, "preconditioner"):
            for weight, p in probabilities(tile.z, self.target):
                s.add_(torch.diag(p.sum(0)) - p.mT @ p, alpha=weight)
            x = with_bias(tile, data)
            g.addmm_(x.mT, x)
            rows += len(x)
        s_values, s_vectors = torch.linalg.eigh(s / rows)
        g_values, g_vectors = torch.linalg.eigh(g / rows)
        scale = 1 / (s_values.clamp_min(0)[:, None] * g_values.clamp_min(0) + self.l2)

        def apply(b: Tensor) -> Tensor:
            solved: Tensor = s_vectors @ ((s_vectors.mT @ b @ g_vectors) * scale) @ g_vectors.mT
            return solved

        return apply

    def solve(self, b: Tensor) -> Solution:
        """Solves for (K, C, D); reports the residuals achieved.

        Raises:
            SolveError: If the tolerance is not reached.
        """
        b = b.double()
        if self.method == "cg":
            return conjugate_gradients(
                self.operator,
                b,
                tol=self.tol,
                max_iterations=self.max_iterations,
                precondition=self.preconditioner,
                progress=self.progress,
            )
        x = torch.cholesky_solve(b.flatten(1).mT, self.factor).mT.reshape(b.shape)
        residuals = true_residuals(self.operator, x, b)
        if not bool((residuals <= self.tol).all()):
            raise SolveError(
                f"Cholesky's solution has a relative residual of {float(residuals.max()):.1e}, tol is {self.tol:.1e}: "
                "ask for less, or use a larger l2"
            )
        return Solution(x, residuals, 0, "cholesky")


def check_l2(l2: float) -> None:
    """Refuses a penalty that leaves the Hessian singular.

    Raises:
        ShapeError: If ``l2`` is not positive and finite.
    """
    if not 0 < l2 < math.inf:
        raise ShapeError(
            f"l2 is {l2}: it must be positive and finite. Without a penalty the Hessian is singular, since adding the "
            "same vector to the weights of every class changes no probability; 1e-4 is common"
        )
