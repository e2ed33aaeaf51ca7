"""Attention transfer: where the activations of each stage are large."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, Term, TermEntry
from kdfast.distillation.losses.features.maps import attention_map, match_sizes

TAPS = ("stage1", "stage2", "stage3")


class Attention(Term):
    """Sum over stages of the mean squared difference of the two networks' normalized attention maps.

    The mean, as in the public codes; the paper has the norm of the difference.
    """

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        pairs = zip(student.at(TAPS), teacher.at(TAPS), strict=True)
        differences = [attention_map(s) - attention_map(t) for s, t in (match_sizes(*pair) for pair in pairs)]
        return torch.stack([difference.square().mean() for difference in differences]).sum()


ATTENTION = TermEntry(
    lambda shapes, options: Attention(),
    "where the activations of each stage are large",
    "Zagoruyko and Komodakis, Paying More Attention to Attention, ICLR 2017, equation 2",
    TAPS,
    tuned=1000,
)
