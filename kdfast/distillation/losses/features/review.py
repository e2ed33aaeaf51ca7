"""ReviewKD: each stage of the teacher is matched by a fusion of the student's stage with all deeper ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.distillation.losses.base import Outputs, Shape, TapShapes, Term, TermEntry
from kdfast.distillation.losses.features.maps import match_sizes

TAPS = ("stage1", "stage2", "stage3", "pooled")
# Sides of the grids on which activations are compared beside their own size.
GRIDS = (4, 2, 1)
WIDEST = 512


class Review(Term):
    """Sum over stages of the hierarchical distance between the fused student and the teacher.

    From the deepest stage to the first, a 1x1 convolution maps the student's activations to a common width, attention
    fuses them with those of the stage before, and a 3x3 convolution maps the result to the teacher's channels. The
    distance is the mean squared difference at full size and on grids of 4, 2 and 1, with weights 1, 1/2, 1/4, 1/8 of
    those that are smaller than the map, over their sum.
    """

    def __init__(self, shapes: TapShapes) -> None:
        super().__init__()
        pairs = shapes.pairs(TAPS)
        width = min(WIDEST, pairs[-1][0][0])
        self.stages = nn.ModuleList(_Fusion(*pair, width, fuses=pair is not pairs[-1]) for pair in pairs)

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        deeper: Tensor | None = None
        distances = []
        triples = zip(self.stages, student.at(TAPS), teacher.at(TAPS), strict=True)
        for stage, ours, theirs in reversed(list(triples)):
            fused, deeper = stage(_as_map(ours), deeper)
            distances.append(_hierarchical_distance(*match_sizes(fused, _as_map(theirs))))
        return torch.stack(distances).sum()


class _Fusion(nn.Module):
    def __init__(self, student: Shape, teacher: Shape, width: int, *, fuses: bool) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv2d(student[0], width, 1, bias=False), nn.BatchNorm2d(width))
        self.widen = nn.Sequential(nn.Conv2d(width, teacher[0], 3, padding=1, bias=False), nn.BatchNorm2d(teacher[0]))
        self.attention = nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid()) if fuses else None

    def forward(self, x: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the activations to compare with the teacher's, and those that the next stage fuses with its own."""
        x = self.narrow(x)
        if self.attention is not None and deeper is not None:
            deeper = F.interpolate(deeper, x.shape[2:], mode="nearest")
            shares = self.attention(torch.cat([x, deeper], 1))
            x = x * shares[:, :1] + deeper * shares[:, 1:]
        return self.widen(x), x


def _as_map(x: Tensor) -> Tensor:
    return x[:, :, None, None] if x.dim() == 2 else x


def _hierarchical_distance(s: Tensor, t: Tensor) -> Tensor:
    total, weight, weights = F.mse_loss(s, t), 1.0, 1.0
    for grid in GRIDS:
        if grid >= s.shape[2]:
            continue
        weight /= 2
        weights += weight
        total = total + weight * F.mse_loss(F.adaptive_avg_pool2d(s, grid), F.adaptive_avg_pool2d(t, grid))
    return total / weights


REVIEW = TermEntry(
    lambda shapes, options: Review(shapes),
    "each stage against a fusion of the student's stage and all deeper ones",
    "Chen et al., Distilling Knowledge via Knowledge Review, CVPR 2021, figures 3 and 4",
    TAPS,
    tuned=5,
)
