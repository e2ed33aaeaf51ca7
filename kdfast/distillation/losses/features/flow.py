"""FSP: how the channels of consecutive stages vary together over the image (flow of solution procedure)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, TapShapes, Term, TermEntry, require_equal
from kdfast.distillation.losses.features.maps import match_sizes

TAPS = ("stem", "stage1", "stage2", "stage3")


class Flow(Term):
    """Sum over consecutive taps of the mean squared difference of G = F_i F_(i+1)^T / (h w) of both networks.

    The networks need equal numbers of channels.
    """

    def __init__(self, shapes: TapShapes) -> None:
        super().__init__()
        require_equal(shapes, TAPS, "fsp", slice(0, 1), "numbers of channels")

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        matrices = zip(_matrices(student.at(TAPS)), _matrices(teacher.at(TAPS)), strict=True)
        return torch.stack([(ours - theirs).square().mean() for ours, theirs in matrices]).sum()


def _matrices(taps: list[Tensor]) -> list[Tensor]:
    """Return G (B, C_i, C_(i+1)) of each pair of consecutive taps."""
    found = []
    for pair in pairwise(taps):
        a, b = (x.flatten(2) for x in match_sizes(*pair))
        found.append(a @ b.mT / a.shape[2])
    return found


FLOW = TermEntry(
    lambda shapes, options: Flow(shapes),
    "how the channels of consecutive stages vary together",
    "Yim et al., A Gift from Knowledge Distillation, CVPR 2017, equations 1 and 2",
    TAPS,
    tuned=50,
    initial=True,
)
