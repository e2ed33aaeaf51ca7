"""Removal of one training sample: its effect on the weights and on the sample's own loss, without retraining.

For F = (1/N) sum of losses + (l2 / 2) ||W||^2 at its minimum, with Hessian H and a sample's gradient g_i, removing
sample i (dropping its term while keeping 1/N) moves the weights by H^-1 g_i / N to first order. The exact Newton step
also accounts for the loss of the sample's own curvature: with J_i = I (x) h_i^T, M_i = J_i H^-1 J_i^T, and the sample's
residual r_i and curvature S_i, it is

    (1/N) H^-1 J_i^T (I - S_i M_i / N)^-1 r_i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.float32 import full_float32
from kdfast.ops.softmax_head.curvature import curvature_matrices, curvature_terms
from kdfast.ops.softmax_head.data import Features, HeadData, Tile
from kdfast.ops.softmax_head.dense_hessian import append_bias, hessian, leverages, third_derivative
from kdfast.ops.softmax_head.residuals import LossConfig, residuals
from kdfast.ops.softmax_head.solve import CHOLESKY_LIMIT, HeadSolver
from kdfast.ops.softmax_head.validation import Array, check_tensor
from kdfast.progress import Progress

__all__ = ["LeaveOneOut", "head_leave_one_out"]

CG_SAMPLES = 32  # samples that conjugate gradients solve for at a time


@full_float32()
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
    alpha: float | None = None,
    temperature: float = 4.0,
    tol: float = 1e-6,
    method: str = "auto",
    max_iterations: int | None = None,
    tile_rows: int | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """Predict how the head's weights change if a training sample is removed, for each of the given samples.

    The other samples keep the weight 1/N: the head is that of ``head_newton`` without the sample with
    ``l2 * N / (N - 1)``. Add the result to the weights to obtain it, and evaluate on it any quantity that
    ``head_influence`` does not cover, such as accuracy or the predictions for other samples.

    Args:
        features: As in ``head_influence``, and likewise for all others.
        logits: (N, C), or None with blocks.
        labels: (N,) int64, or None with blocks.
        rows: (n,) int64, the samples to remove, each on its own.
        l2: Weight of the penalty, > 0.
        bias: Whether the head has a bias.
        corrected: Whether to account for the sample's own curvature, which makes the change the exact Newton step.
            Pass False for heads too large for the Hessian as a matrix.
        teacher: (N, C) teacher logits, with ``alpha``.
        alpha: Weight of the divergence from the teacher; None: 0, for no teacher.
        temperature: T > 0 of the divergence.
        tol: Relative residual required of the solve.
        method: "auto", "cholesky" or "cg".
        max_iterations: Limit on the Hessian products of conjugate gradients.
        tile_rows: Samples computed at a time; None chooses by cache size.
        progress: Called with (done, total or 0 if unknown, note).

    Returns:
        (n, C, D), including the bias; float64 if features or logits are, else float32.

    Raises:
        ShapeError, DataError, SolveError: As ``head_influence``.
        IndexError: If a row lies outside [0, N).
    """
    data = HeadData(features, logits, labels, teacher, bias=bias, tile_rows=tile_rows)
    check_tensor("rows", rows, floating=False)
    if rows.dim() != 1 or rows.dtype != torch.int64 or len(rows) == 0:
        raise ShapeError(f"`rows` has dtype {rows.dtype} and shape {tuple(rows.shape)}: pass (n,) int64 sample indices")
    removal = LeaveOneOut(
        data, l2, LossConfig.of(alpha, temperature, teacher), corrected, tol, method, max_iterations, progress
    )
    if bool((rows < 0).any()) or bool((rows >= data.num_rows).any()):
        raise IndexError(f"`rows` has an index outside [0, {data.num_rows}): pass indices of training samples")
    rows = rows.to(data.device)
    right = torch.zeros(len(rows), data.num_classes, data.dim, dtype=torch.float64, device=data.device)
    for tile in data.tiles(data.dim, torch.float64, progress, "leave one out"):
        in_tile = ((rows >= tile.start) & (rows < tile.start + len(tile.x))).nonzero()[:, 0]
        if len(in_tile):
            selected = tile.select(rows[in_tile] - tile.start)
            right[in_tile] = removal.weighted_residuals(selected)[:, :, None] * append_bias(selected, data)[:, None]
    return removal.divide_by_n(removal.solver.solve(right).x)


class LeaveOneOut:
    """Predictor of the effects of removing training samples one at a time.

    Args:
        data: The training samples.
        l2: Weight of the penalty, > 0.
        loss: The training loss.
        corrected: Whether to account for a sample's own curvature.
        tol: Relative residual required of solves.
        method: "auto", "cholesky" or "cg".
        max_iterations: Limit on the Hessian products of conjugate gradients.
        progress: Called with (done, total or 0 if unknown, note).

    Raises:
        ShapeError: If options do not fit, or the correction would need too large a matrix.
        DataError: If all labels are one class, or the data can be read only once.
        SolveError: If the Hessian is not positive definite.
    """

    def __init__(
        self,
        data: HeadData,
        l2: float,
        loss: LossConfig,
        corrected: bool,
        tol: float,
        method: str,
        max_iterations: int | None,
        progress: Progress | None,
    ) -> None:
        self.solver = HeadSolver(
            data, l2, loss.check(), tol=tol, method=method, max_iterations=max_iterations, progress=progress
        )
        size = data.num_classes * data.dim
        if corrected and self.solver.method != "cholesky":
            raise ShapeError(
                f"`corrected` needs the Hessian as a matrix, and this head has {size} weights (`method` is 'cg', or "
                f"they exceed {CHOLESKY_LIMIT}): pass corrected=False, or method='cholesky' if "
                f"{size**2 * 16 / 1e9:.1f} GB of memory are free"
            )
        self.data, self.loss, self.corrected = data, loss, corrected
        self.solver.prepare()
        if loss.alpha < 1:
            data.require_two_classes()

    def allocate(self) -> Tensor:
        """Allocate one float64 number per sample: tensors kept per tile would fragment the memory."""
        return torch.empty(self.data.num_rows, dtype=torch.float64, device=self.data.device)

    def weighted_residuals(self, tile: Tile) -> Tensor:
        """Return residuals r (n, C) in float64 or, with the correction, (I - S M / N)^-1 r."""
        r = residuals(tile.z, tile.y, tile.t, self.loss)
        return self._correct(tile, r, self._leverages(tile)) if self.corrected else r

    def self_effects(self, tile: Tile) -> Tensor:
        """Return g^T H^-1 g or, with the correction, r^T M (I - S M / N)^-1 r; (n,) float64, not divided by N."""
        r = residuals(tile.z, tile.y, tile.t, self.loss)
        if self.corrected:
            m = self._leverages(tile)
            return (r[:, None] @ m @ self._correct(tile, r, m)[:, :, None])[:, 0, 0]
        g = (r[:, :, None] * append_bias(tile, self.data)[:, None]).flatten(1)
        if self.solver.method == "cholesky":
            half: Tensor = torch.linalg.solve_triangular(self.solver.factor, g.mT, upper=False)
            return half.square().sum(0)
        shape = (-1, self.data.num_classes, self.data.dim)
        parts = torch.split(g, CG_SAMPLES)
        return torch.cat([(self.solver.solve(part.view(shape)).x.flatten(1) * part).sum(1) for part in parts])

    def curvature_term(self, tile: Tile, weighted: Tensor, matrix: Tensor) -> Tensor:
        """Return 1/2 d^T A d for the weight change d = H^-1 J^T weighted / N, times N; (n,).

        Args:
            tile: The samples.
            weighted: (n, C), their ``weighted_residuals``.
            matrix: H^-1 A H^-1 (C D, C D), the ``second_order_matrix``.
        """
        m = leverages(append_bias(tile, self.data), matrix, self.data.num_classes)
        return (weighted[:, None] @ m @ weighted[:, :, None])[:, 0, 0] / (2 * self.data.num_rows)

    def second_order_matrix(self, val: HeadData, u: Tensor) -> Tensor:
        """Return H^-1 (H_val - F''' u) H^-1, (C D, C D), for u = H^-1 g_val (C, D).

        H_val is the Hessian of the mean cross-entropy of ``val``, and F''' u the derivative of the training loss's
        Hessian along ``u``. Together with the leverage they make the effect of a removal correct to second order in
        1/N: the validation loss has the curvature H_val along the step d, and the step itself changes by
        -1/2 H^-1 F''' d d.
        """
        curvature = hessian(val, 0.0, LossConfig()) - third_derivative(self.data, u, self.loss)
        return self.solver.inverse @ curvature @ self.solver.inverse

    def divide_by_n(self, total: Tensor) -> Tensor:
        """Return ``total`` / N in the data's dtype.

        Raises:
            DataError: If it is zero throughout because the head is its own teacher, or overflows.
        """
        self.loss.check_not_all_zero(total)
        result = (total / self.data.count_rows()).to(self.data.dtype)
        if not bool(result.isfinite().all()):
            self.data.raise_nonfinite("the effects of removals", result.dtype)
        return result

    def _leverages(self, tile: Tile) -> Tensor:
        return leverages(append_bias(tile, self.data), self.solver.inverse, self.data.num_classes)

    def _correct(self, tile: Tile, r: Tensor, m: Tensor) -> Tensor:
        """Return (I - S M / N)^-1 r."""
        s = curvature_matrices(curvature_terms(tile.z, self.loss))
        matrix = torch.eye(r.shape[1], dtype=r.dtype, device=r.device) - s @ m / self.data.num_rows
        corrected: Tensor = torch.linalg.solve(matrix, r[:, :, None])
        return corrected[:, :, 0]
