"""FitNets: the student's middle activations, mapped by a convolution, match the teacher's."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, TapShapes, Term, TermEntry
from kdfast.distillation.losses.features.maps import connector, match_sizes

TAPS = ("stage2",)


class FitNets(Term):
    """Mean squared difference of the teacher's activations and the student's behind a 1x1 convolution.

    The adapter ends in batch norm and ReLU, since the teacher's activations do; at a tap before the ReLU, negative
    activations could not be matched.
    """

    def __init__(self, shapes: TapShapes) -> None:
        super().__init__()
        ((student, teacher),) = shapes.pairs(TAPS)
        self.adapter = connector(student, teacher, relu=True)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        ours, theirs = match_sizes(self.adapter(student.taps[TAPS[0]]), teacher.taps[TAPS[0]])
        return F.mse_loss(ours, theirs)


FITNETS = TermEntry(
    lambda shapes, options: FitNets(shapes),
    "activations of the middle stage, through a 1x1 convolution",
    "Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, equation 3",
    TAPS,
    tuned=100,
)
