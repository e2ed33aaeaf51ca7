r"""Residuals of a softmax head: the gradient of each sample's loss with respect to its logits.

For p = softmax(z), p_T = softmax(z / T), a teacher's q_T = softmax(t / T), and the one-hot label e_y, the loss
(1 - a) CE(p, y) + a T^2 KL(q_T || p_T) has the residual

    r = (1 - a) (p - e_y) + a T (p_T - q_T).

r_y is minus the sum of the other classes' probabilities, because p_y - 1 cancels for confident samples. A trained
network gives most of its training samples p_y within rounding of 1, and scores rank these samples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops import backends
from kdfast.ops.kd_loss.validation import check_temperature

__all__ = ["LossConfig", "norms", "reference_residuals", "residuals", "use_native"]


class LossConfig(NamedTuple):
    """The loss (1 - alpha) CE + alpha T^2 KL."""

    alpha: float = 0.0
    temperature: float = 4.0

    @classmethod
    def of(cls, alpha: float | None, temperature: float, teacher: object) -> LossConfig:
        """Return the loss that a caller asks for.

        Raises:
            ShapeError: If there is a teacher, and no weight of it.
        """
        if alpha is None and teacher is not None:
            raise ShapeError("`teacher` is given without `alpha`, its weight: pass both")
        return cls(alpha or 0.0, temperature)

    def check(self) -> LossConfig:
        """Return self if valid.

        Raises:
            ShapeError: If alpha or the temperature is out of range.
        """
        if not 0 <= self.alpha <= 1:
            raise ShapeError(f"`alpha` is {self.alpha}: pass a number in [0, 1]")
        check_temperature(self.temperature)
        return self

    def check_operands(self, y: Tensor | None, t: Tensor | None) -> None:
        """Raise a ShapeError if the labels or the teacher logits that the loss needs are missing."""
        if self.alpha < 1 and y is None:
            raise ShapeError("`labels` is missing: pass (N,) class ids, or alpha=1")
        if self.alpha > 0 and t is None:
            raise ShapeError("`teacher` is missing: pass (N, C) teacher logits, or alpha=0")

    def check_not_all_zero(self, result: Tensor) -> None:
        """Raise a DataError if every gradient is zero because the head is its own teacher."""
        if self.alpha == 1 and not bool(result.any()):
            raise DataError(
                "every gradient is zero: with alpha = 1 the teacher's logits equal the head's own, which minimizes the "
                "divergence. Use hard labels (alpha < 1), or the logits of a proxy"
            )


def residuals(z: Tensor, y: Tensor | None, t: Tensor | None, loss: LossConfig) -> Tensor:
    """Return the gradient of each row's loss with respect to its logits, (n, C).

    Args:
        z: (n, C) float32 or float64.
        y: (n,) int64 in [0, C); may be None if alpha is 1.
        t: (n, C) teacher logits; may be None if alpha is 0.
        loss: The loss.

    Raises:
        ShapeError: If the labels or the teacher logits that the loss needs are missing.
    """
    loss.check_operands(y, t)
    if use_native(z):
        from kdfast.ops.softmax_head import native

        return native.residuals(z, y, t, *loss)
    return reference_residuals(z, y, t, loss)


def norms(z: Tensor, y: Tensor | None, t: Tensor | None, x: Tensor, bias: bool, loss: LossConfig) -> Tensor:
    """Return ||r|| ||h|| of each row, (n,); h is the row of features ``x`` (n, D), with a 1 appended if ``bias``.

    Raises:
        ShapeError: As ``residuals``.
    """
    loss.check_operands(y, t)
    if use_native(z):
        from kdfast.ops.softmax_head import native

        return native.norms(z, y, t, x, float(bias), *loss)
    r = torch.linalg.vector_norm(reference_residuals(z, y, t, loss), dim=1, dtype=torch.float64)
    norms: Tensor = (r * (x.square().sum(1) + int(bias)).sqrt()).to(z.dtype)
    return norms


def reference_residuals(z: Tensor, y: Tensor | None, t: Tensor | None, loss: LossConfig) -> Tensor:
    """Compute ``residuals`` in plain PyTorch."""
    alpha, temperature = loss
    r = torch.zeros_like(z)
    if y is not None and alpha < 1:
        p = z.softmax(1).scatter_(1, y[:, None], 0.0)
        r += (1 - alpha) * p.scatter_(1, y[:, None], -p.sum(1, keepdim=True))
    if t is not None and alpha > 0:
        r += alpha * temperature * ((z / temperature).softmax(1) - (t / temperature).softmax(1))
    return r


def use_native(z: Tensor) -> bool:
    """Return whether compiled kernels run for tensors like ``z``.

    Only then do callers import ``native``: the reference works without the extension.
    """
    name = backends.resolve("softmax_head", z.device.type, str(z.dtype).removeprefix("torch."))
    return name != "reference"
