"""What a softmax head's training sample pulls with when it is removed, and what that does to its own loss."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.softmax_head.data import HeadData, Progress, Tile
from kdfast.ops.softmax_head.dense_hessian import hessian, leverages, third_derivative, with_bias
from kdfast.ops.softmax_head.residuals import Target, curvatures, probabilities, residuals
from kdfast.ops.softmax_head.solve import CHOLESKY_LIMIT, HeadSolver

__all__ = ["Removal"]

COLUMNS = 32  # samples that conjugate gradients solve for at a time


class Removal:
    """Removes samples one at a time, on paper.

    Args:
        data: The training samples.
        l2: Weight of the penalty, > 0.
        target: The training loss.
        corrected: Whether a sample's own curvature is counted.
        tol: Relative residual of solves.
        method: "auto", "cholesky" or "cg".
        max_iterations: Products at most of conjugate gradients.
        progress: Called with (done, in all or 0, note).

    Raises:
        ShapeError: If options do not fit, or the correction would need a matrix that is too large.
        DataError: If labels are all one class, or the data can be read only once.
        SolveError: If the Hessian is not positive definite.
    """

    def __init__(
        self,
        data: HeadData,
        l2: float,
        target: Target,
        corrected: bool,
        tol: float,
        method: str,
        max_iterations: int | None,
        progress: Progress | None,
    ) -> None:
        self.solver = HeadSolver(
            data, l2, target.check(), tol=tol, method=method, max_iterations=max_iterations, progress=progress
        )
        size = data.classes * data.dim
        if corrected and self.solver.method != "cholesky":
            raise ShapeError(
                f"corrected=True needs the Hessian as a matrix, and this head has {size} weights (method='cg', or more "
                f"than {CHOLESKY_LIMIT}): use corrected=False, or method='cholesky' if {size**2 * 16 / 1e9:.1f} GB "
                "are there"
            )
        self.data, self.target, self.corrected = data, target, corrected
        self.solver.prepare()
        if target.alpha < 1:
            data.require_two_classes()

    def empty(self) -> Tensor:
        """Room for one number a sample, float64: results of tiles kept one by one would pin the memory between them."""
        return torch.empty(self.data.total, dtype=torch.float64, device=self.data.device)

    def pulls(self, tile: Tile) -> Tensor:
        """Residuals r (n, C), or with the correction (I - S M / N)^-1 r, in float64."""
        r = residuals(tile.z, tile.y, tile.t, self.target)
        return self._amplify(tile, r, self._leverages(tile)) if self.corrected else r

    def own_effect(self, tile: Tile) -> Tensor:
        """g^T H^-1 g, or with the correction r^T M (I - S M / N)^-1 r; (n,) float64, not yet divided by N."""
        r = residuals(tile.z, tile.y, tile.t, self.target)
        if self.corrected:
            m = self._leverages(tile)
            return (r[:, None] @ m @ self._amplify(tile, r, m)[:, :, None])[:, 0, 0]
        g = (r[:, :, None] * with_bias(tile, self.data)[:, None]).flatten(1)
        if self.solver.method == "cholesky":
            half: Tensor = torch.linalg.solve_triangular(self.solver.factor, g.mT, upper=False)
            return half.square().sum(0)
        shape = (-1, self.data.classes, self.data.dim)
        parts = [(self.solver.solve(few.view(shape)).x.flatten(1) * few).sum(1) for few in torch.split(g, COLUMNS)]
        return torch.cat(parts)

    def bend(self, tile: Tile, pulls: Tensor, curvature: Tensor) -> Tensor:
        """1/2 d^T A d for the change d = H^-1 J^T pulls / N, times N; (n,).

        Args:
            tile: The samples.
            pulls: (n, C), their corrected pulls.
            curvature: H^-1 A H^-1 (C D, C D), of ``second_order``.
        """
        m = leverages(with_bias(tile, self.data), curvature, self.data.classes)
        return (pulls[:, None] @ m @ pulls[:, :, None])[:, 0, 0] / (2 * self.data.total)

    def second_order(self, val: HeadData, u: Tensor) -> Tensor:
        """H^-1 (H_val - F''' u) H^-1 for u = H^-1 g_val (C, D); a matrix (C D, C D).

        H_val is the Hessian of the mean cross-entropy of ``val``, F''' u the change of the training loss's along
        ``u``. With the leverage they make the effect of a removal right to second order in 1/N: the validation loss
        bends by H_val along the step, and the step itself by -1/2 H^-1 F''' d d.
        """
        bend = hessian(val, 0.0, Target()) - third_derivative(self.data, u, self.target)
        return self.solver.inverse @ bend @ self.solver.inverse

    def result(self, total: Tensor) -> Tensor:
        """``total`` / N in the data's dtype.

        Raises:
            DataError: If it is zero throughout because the head is its own teacher, or overflows.
        """
        self.target.check_alive(total)
        result = (total / self.data.total).to(self.data.dtype)
        if not bool(result.isfinite().all()):
            self.data.explain("the effects of removals", result.dtype)
        return result

    def _leverages(self, tile: Tile) -> Tensor:
        return leverages(with_bias(tile, self.data), self.solver.inverse, self.data.classes)

    def _amplify(self, tile: Tile, r: Tensor, m: Tensor) -> Tensor:
        s = curvatures(probabilities(tile.z, self.target))
        matrix = torch.eye(r.shape[1], dtype=r.dtype, device=r.device) - s @ m / self.data.total
        scaled: Tensor = torch.linalg.solve(matrix, r[:, :, None])
        return scaled[:, :, 0]
