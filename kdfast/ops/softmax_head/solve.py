"""Linear solves with a softmax head's Hessian: Cholesky for small heads, else preconditioned conjugate gradients."""

from __future__ import annotations

import contextlib
from functools import cached_property

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError, SolveError
from kdfast.ops.conjugate_gradients import Operator, Solution, conjugate_gradients, true_residuals
from kdfast.ops.float32 import full_float32
from kdfast.ops.softmax_head.data import Features, HeadData
from kdfast.ops.softmax_head.dense_hessian import hessian
from kdfast.ops.softmax_head.hvp import check_vectors, hessian_products
from kdfast.ops.softmax_head.kronecker import FeatureFactor, kronecker_factors
from kdfast.ops.softmax_head.residuals import LossConfig
from kdfast.ops.softmax_head.validation import Array, check_positive_l2, check_tol
from kdfast.progress import Progress

__all__ = ["CHOLESKY_LIMIT", "FLOAT32_TOL", "HeadSolver", "choose_method", "head_solve", "solve_in_float32"]

CHOLESKY_LIMIT = 10_000  # most weights C * D for which the Hessian becomes a matrix: 0.8 GB in float64
# Solves down to this relative residual may take float32 products, of relative error 1e-6, so many.
FLOAT32_TOL = 1e-4
_FLOAT32_PRODUCTS = 100


@full_float32()
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
    """Solve H x = b for the Hessian of ``head_hvp`` and K right-hand sides.

    ``HeadSolver`` does the same, keeps its factorization for further calls, and reports the residuals it achieves.

    Args:
        features: (N, D') without the bias, tensor or (memory-mapped) array; or a re-iterable of blocks
            (features, logits).
        logits: (N, C) of the head; None if ``features`` are blocks.
        b: (C, D) or (K, C, D); with a bias, D = D' + 1 and the bias is the last column.
        l2: Weight of the penalty (l2 / 2) ||W||^2, > 0: without it the Hessian is singular, since adding the same
            vector to the weights of every class changes no probability.
        bias: Whether the head has a bias.
        tol: Relative residual ||b - H x|| / ||b|| required of each right-hand side.
        alpha: Weight of the divergence from a teacher in the loss.
        temperature: T > 0 of the divergence.
        method: "auto", "cholesky" or "cg"; "auto" selects Cholesky for up to 10,000 weights.
        max_iterations: Limit on the Hessian products of conjugate gradients; None: ten a weight, at most 10,000.
        tile_rows: Samples computed at a time; None chooses by cache size.
        progress: Called with (done, total or 0 if unknown, note).

    Returns:
        float64 in the shape of ``b``; rounding to a narrower dtype would exceed the tolerance.

    Raises:
        ShapeError: If shapes, devices, dtypes or options do not fit.
        DataError: If there are no rows, a number is not finite, or the data can be read only once.
        SolveError: If the tolerance is not reached.
    """
    data = HeadData(features, logits, bias=bias, tile_rows=tile_rows)
    loss = LossConfig(alpha, temperature).check()
    solver = HeadSolver(data, l2, loss, tol=tol, method=method, max_iterations=max_iterations, progress=progress)
    return solver.solve(check_vectors("b", b, data)).x.reshape(b.shape)


def choose_method(method: str, data: HeadData) -> str:
    """Return the method of a solve, "cholesky" or "cg", for a choice that may be "auto".

    Raises:
        ShapeError: If the choice is another.
    """
    if method not in ("auto", "cholesky", "cg"):
        raise ShapeError(f"`method` is {method!r}: pass 'auto', 'cholesky' or 'cg'")
    if method == "auto":
        return "cholesky" if data.num_classes * data.dim <= CHOLESKY_LIMIT else "cg"
    return method


def solve_in_float32(exact: HeadSolver, data: HeadData, b: Tensor) -> Tensor:
    """Solve for one right-hand side ``b`` (C, D) with float32 products, or with a solver's own where these fail.

    Args:
        exact: The solver, by conjugate gradients to a relative residual of at least ``FLOAT32_TOL``.
        data: The samples of the solver; their tensors may be float32.
        b: The right-hand side, float64.

    Raises:
        SolveError: As ``exact.solve``.
    """
    solver = HeadSolver(
        data, exact.l2, exact.loss,
        tol=exact.tol, method="cg", max_iterations=_FLOAT32_PRODUCTS, products=torch.float32, features=exact.features,
    )  # fmt: skip
    # Float64 may solve what is too ill-conditioned or too large for float32.
    with contextlib.suppress(SolveError, DataError):
        return solver.solve(b[None]).x[0]
    return exact.solve(b[None]).x[0]


class HeadSolver:
    """Solver of linear systems with the Hessian of a softmax head, for any number of calls.

    Args:
        data: The training samples, with the logits of the head.
        l2: Weight of the penalty, > 0.
        loss: The training loss.
        tol: Relative residual required.
        method: "auto", "cholesky" or "cg".
        max_iterations: Limit on the Hessian products of conjugate gradients; None: ten a weight, at most 10,000.
        products: dtype of the Hessian products of conjugate gradients; float32 suits tolerances of ``FLOAT32_TOL`` and
            more.
        features: For the preconditioner, the factor of the same features; None computes it.
        progress: Called with (done, total or 0 if unknown, note).

    Raises:
        ShapeError: If an option does not fit.
        DataError: If the data can be read only once.
    """

    def __init__(
        self,
        data: HeadData,
        l2: float,
        loss: LossConfig | None = None,
        *,
        tol: float = 1e-6,
        method: str = "auto",
        max_iterations: int | None = None,
        products: torch.dtype = torch.float64,
        features: FeatureFactor | None = None,
        progress: Progress | None = None,
    ) -> None:
        check_positive_l2(l2)
        check_tol(tol)
        data.require_multiple_passes("a solve")
        self.data, self.l2, self.loss, self.tol = data, l2, loss or LossConfig(), tol
        self.max_iterations, self.progress, self.products = max_iterations, progress, products
        self.features, self.method = features, choose_method(method, data)

    def operator(self, v: Tensor) -> Tensor:
        """Return H V for ``v`` (K, C, D) float64."""
        return hessian_products(self.data, v.to(self.products), self.l2, self.loss).double()

    def prepare(self) -> None:
        """Compute the factor or the preconditioner, which reads the data once; by default the first solve does.

        Raises:
            SolveError: If the Hessian is not positive definite in float64.
        """
        _ = self.factor if self.method == "cholesky" else self.preconditioner

    @cached_property
    def factor(self) -> Tensor:
        """Lower Cholesky factor (C D, C D), float64."""
        matrix = hessian(self.data, self.l2, self.loss, self.progress)
        if not bool(matrix.diagonal().isfinite().all()):
            raise DataError("the Hessian overflows float64: scale the features down")
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(matrix)
        if int(info) != 0:
            raise SolveError(
                f"the Hessian is not positive definite in float64 with `l2` {self.l2}: increase `l2`, or scale the "
                "features to similar size"
            )
        return factor

    @cached_property
    def inverse(self) -> Tensor:
        """H^-1 (C D, C D), float64."""
        return torch.cholesky_inverse(self.factor)

    @cached_property
    def preconditioner(self) -> Operator:
        """The inverse of mean(S) (x) X^T X / N + l2, applied through the eigenvectors of both factors."""
        left, right, scale = kronecker_factors(
            self.data, self.l2, self.loss, self.progress, "preconditioner", self.features
        )

        def apply(b: Tensor) -> Tensor:
            solved: Tensor = left @ ((left.mT @ b @ right) * scale) @ right.mT
            return solved

        return apply

    def solve(self, b: Tensor) -> Solution:
        """Solve for right-hand sides ``b`` (K, C, D) and report the residuals achieved.

        Raises:
            SolveError: If the Hessian is not positive definite, or the tolerance is not reached.
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
                f"the Cholesky solution has a relative residual of {float(residuals.max()):.1e}, `tol` is "
                f"{self.tol:.1e}: increase `tol` or `l2`"
            )
        return Solution(x, residuals, 0, "cholesky")
