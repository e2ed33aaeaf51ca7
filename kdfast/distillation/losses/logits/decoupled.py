"""DKD: the divergence of target against all other classes, and that among the other classes, weighted apart."""

from __future__ import annotations

from kdfast.distillation.losses.base import TermEntry
from kdfast.distillation.losses.logits.divergences import Divergence
from kdfast.errors import UsageError


class Decoupled(Divergence):
    """alpha T^2 KL of (p_y, 1 - p_y) plus beta T^2 KL of the distributions over the other classes; mean over rows.

    Args:
        alpha: Weight of the first.
        beta: Weight of the second.
        temperature: T.
    """

    def __init__(self, alpha: float, beta: float, temperature: float) -> None:
        if alpha < 0 or beta < 0:
            raise UsageError(f"the term dkd has alpha {alpha:g} and beta {beta:g}: pass numbers of at least 0")
        super().__init__(temperature, divergence="dkd", dkd_weights=(alpha, beta))


DECOUPLED = TermEntry(
    lambda shapes, options: Decoupled(options["alpha"], options["beta"], options["temperature"]),
    "the target against all others, and the others among themselves, weighted apart",
    "Zhao et al., Decoupled Knowledge Distillation, CVPR 2022",
    options={"alpha": 1.0, "beta": 8.0, "temperature": 4.0},
    labels=True,
)
