"""SP: which samples of a batch have similar activations (similarity-preserving distillation)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, Term, TermEntry

TAPS = ("stage3",)


class Similarity(Term):
    """Mean over B^2 pairs of the squared difference of the row-normalized Gram matrices F F^T of both networks."""

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        return (_gram(student.taps[TAPS[0]]) - _gram(teacher.taps[TAPS[0]])).square().mean()


def _gram(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return F.normalize(torch.mm(x, x.mT))


SIMILARITY = TermEntry(
    lambda shapes, options: Similarity(),
    "which samples of a batch have similar activations",
    "Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, equations 2 to 4",
    TAPS,
    tuned=3000,
    relates=True,
    axes=False,
)
