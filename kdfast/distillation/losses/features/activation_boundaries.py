"""Activation boundaries: whether each neuron is active, by a hinge on the activations before the ReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kdfast.distillation.losses.base import Outputs, TapShapes, Term, TermEntry
from kdfast.distillation.losses.features.maps import connector, match_sizes

TAPS = ("preactivation1", "preactivation2", "preactivation3")
MARGIN = 1.0
# The public code's scale of the sum over all neurons of a sample.
SCALE = 3 / 1000


class ActivationBoundaries(Term):
    """Sum over stages l = 0, 1, 2 of 2^(l - 2) * 3 / 1000 * (sum over neurons of a squared hinge), mean over samples.

    A neuron that is inactive in the teacher (t <= 0) should be below -1 in the student, and an active one above 1. The
    student passes through a 1x1 convolution with batch norm.
    """

    def __init__(self, shapes: TapShapes) -> None:
        super().__init__()
        self.adapters = nn.ModuleList(connector(*pair, relu=False) for pair in shapes.pairs(TAPS))

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        parts = []
        for stage, (adapter, ours, theirs) in enumerate(
            zip(self.adapters, student.at(TAPS), teacher.at(TAPS), strict=True)
        ):
            s, t = match_sizes(adapter(ours), theirs)
            parts.append(2.0 ** (stage - len(TAPS) + 1) * SCALE / len(s) * _hinge(s, t))
        return torch.stack(parts).sum()


def _hinge(s: Tensor, t: Tensor) -> Tensor:
    # The sign that the student should have, times the student's activation, should exceed the margin.
    sign = torch.where(t > 0, 1.0, -1.0)
    return (MARGIN - sign * s).clamp_min(0).square().sum()


ACTIVATION_BOUNDARIES = TermEntry(
    lambda shapes, options: ActivationBoundaries(shapes),
    "which neurons are active, before the ReLU",
    "Heo et al., Knowledge Transfer via Distillation of Activation Boundaries Formed by Hidden Neurons, AAAI 2019, "
    "equation 3",
    TAPS,
    initial=True,
)
