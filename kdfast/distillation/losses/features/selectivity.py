"""NST: the distributions of the channels' spatial patterns, by the maximum mean discrepancy."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, Term, TermEntry
from kdfast.distillation.losses.features.maps import match_sizes

TAPS = ("stage1", "stage2", "stage3")


class Selectivity(Term):
    """Sum over stages of the squared maximum mean discrepancy of the channels' normalized maps, kernel (a . b)^2."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        return torch.stack(
            [_discrepancy(*match_sizes(s, t)) for s, t in zip(student.at(TAPS), teacher.at(TAPS), strict=True)]
        ).sum()


def _discrepancy(s: Tensor, t: Tensor) -> Tensor:
    s, t = (F.normalize(x.flatten(2), dim=2) for x in (s, t))
    # Batched products: a broadcast product of all pairs of channels would take h * w times the memory.
    ours, theirs, mixed = (torch.bmm(a, b.mT).square().mean() for a, b in ((s, s), (t, t), (s, t)))
    return ours + theirs - 2 * mixed


SELECTIVITY = TermEntry(
    lambda shapes, options: Selectivity(),
    "distributions of the channels' spatial patterns",
    "Huang and Wang, Like What You Like: Knowledge Distill via Neuron Selectivity Transfer, 2017, equation 4, "
    "polynomial kernel",
    TAPS,
    tuned=50,
)
