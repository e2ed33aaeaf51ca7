"""SP: which samples of a batch have similar activations (similarity-preserving distillation)."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, Term, TermEntry

TAPS = ("stage3",)
POOLED_TAPS = ("pooled",)


class Similarity(Term):
    """Mean over B^2 pairs of the squared difference of the row-normalized Gram matrices F F^T of both networks.

    Args:
        tap: The activations F that are compared.
    """

    def __init__(self, tap: str) -> None:
        super().__init__()
        self._tap = tap

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        return (_gram(student.taps[self._tap]) - _gram(teacher.taps[self._tap])).square().mean()


def _gram(x: Tensor) -> Tensor:
    x = x.flatten(1)
    return F.normalize(torch.mm(x, x.mT))


SIMILARITY = TermEntry(
    lambda shapes, options: Similarity(*TAPS),
    "which samples of a batch have similar activations",
    "Tung and Mori, Similarity-Preserving Knowledge Distillation, ICCV 2019, equations 2 to 4",
    TAPS,
    tuned=3000,
    relates=True,
    axes=False,
)

POOLED_SIMILARITY = dataclasses.replace(
    SIMILARITY,
    build=lambda shapes, options: Similarity(*POOLED_TAPS),
    summary="which samples of a batch have similar pooled features",
    taps=POOLED_TAPS,
)
