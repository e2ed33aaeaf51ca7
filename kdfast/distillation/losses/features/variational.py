"""VID: the teacher's activations under a Gaussian that the student predicts (variational information)."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.distillation.losses.base import Outputs, Shape, TapShapes, Term, TermEntry
from kdfast.distillation.losses.features.maps import match_sizes

TAPS = ("stage1", "stage2", "stage3")
INITIAL_VARIANCE = 5.0
LEAST_VARIANCE = 1e-5


class VariationalInformation(Term):
    """Sum over stages of the mean of 1/2 ((mu(s) - t)^2 / v + log v), v one trained variance for each channel.

    v = softplus(rho) + 1e-5 starts at 5, and rho has no weight decay.
    """

    def __init__(self, shapes: TapShapes) -> None:
        super().__init__()
        self.stages = nn.ModuleList(_Stage(*pair) for pair in shapes.pairs(TAPS))

    def parameters_without_decay(self) -> list[nn.Parameter]:
        """Return the variances' parameters: decay would pull them to softplus(0), whatever the data."""
        return [parameter for name, parameter in self.named_parameters() if name.endswith("rho")]

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        triples = zip(self.stages, student.at(TAPS), teacher.at(TAPS), strict=True)
        return torch.stack([stage(ours, theirs) for stage, ours, theirs in triples]).sum()


class _Stage(nn.Module):
    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        widths = (student[0], teacher[0], teacher[0], teacher[0])
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Conv2d(inputs, outputs, 1, bias=False), nn.ReLU()]
        self.mean = nn.Sequential(*layers[:-1])
        self.rho = nn.Parameter(torch.full((teacher[0],), math.log(math.expm1(INITIAL_VARIANCE - LEAST_VARIANCE))))

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        s, t = match_sizes(s, t)
        variance = (F.softplus(self.rho) + LEAST_VARIANCE)[:, None, None]
        value: Tensor = 0.5 * ((self.mean(s) - t).square() / variance + variance.log()).mean()
        return value


VARIATIONAL_INFORMATION = TermEntry(
    lambda shapes, options: VariationalInformation(shapes),
    "the teacher's activations under a Gaussian predicted by the student",
    "Ahn et al., Variational Information Distillation for Knowledge Transfer, CVPR 2019, equations 5 and 6",
    TAPS,
)
