"""PKT: the similarities of a batch's pooled features, as conditional probabilities."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, Term, TermEntry

TAPS = ("pooled",)
EPSILON = 1e-7


class Probabilities(Term):
    """Mean over all pairs of samples of p_t log(p_t / p_s), with p from cosine similarities scaled to [0, 1].

    The mean over B^2 pairs, not over B rows, explains the large weight that is usual.
    """

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        ours, theirs = _conditional(student.taps[TAPS[0]]), _conditional(teacher.taps[TAPS[0]])
        return (theirs * ((theirs + EPSILON) / (ours + EPSILON)).log()).mean()


def _conditional(x: Tensor) -> Tensor:
    """Return the rows of scaled cosine similarities, each with sum 1: (B, D) -> (B, B)."""
    x = F.normalize(x)
    similarity = (x @ x.mT + 1) / 2
    return similarity / similarity.sum(1, keepdim=True)


PROBABILITIES = TermEntry(
    lambda shapes, options: Probabilities(),
    "similarities of pooled features as probabilities",
    "Passalis and Tefas, Learning Deep Representations with Probabilistic Knowledge Transfer, ECCV 2018, equations 5 "
    "to 8",
    TAPS,
    tuned=30_000,
    relates=True,
)
