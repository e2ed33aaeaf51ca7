"""RKD: distances and angles among the pooled features of a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.distillation.losses.base import Outputs, Term, TermEntry
from kdfast.distillation.losses.features.maps import pairwise_distances

TAPS = ("pooled",)
DISTANCE_WEIGHT, ANGLE_WEIGHT = 25.0, 50.0
# Numbers in a tile of angles: anchors x B x max(B, D).
TILE = 1 << 22


class Relations(Term):
    """25 smoothL1 of the distances over their mean, plus 50 smoothL1 of the cosines of the angles of all triples.

    For a batch of one sample, which has no pairs, it is 0.
    """

    def forward(self, student: Outputs, teacher: Outputs, labels: Tensor) -> Tensor:
        """Return the term's value for a batch."""
        ours, theirs = student.taps[TAPS[0]], teacher.taps[TAPS[0]]
        distance = F.smooth_l1_loss(_relative_distances(ours), _relative_distances(theirs))
        return DISTANCE_WEIGHT * distance + ANGLE_WEIGHT * angle_loss(ours, theirs)


def _relative_distances(x: Tensor) -> Tensor:
    """Return the distances of all pairs over the mean of the positive ones."""
    distances = pairwise_distances(x)
    # By products rather than by an index: the number of positive ones stays on the device.
    return distances / (distances.sum() / (distances > 0).sum().clamp_min(1)).clamp_min(1e-12)


def angle_loss(ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the mean over B^3 triples (j; k, l) of smoothL1 of the cosines of the angles at j.

    The triples are taken in tiles of some j, and each tile's gradient is computed with its value, so that no buffer of
    B^3 numbers is kept.

    Args:
        ours: (B, D), the student's features.
        theirs: (B, D'), the teacher's.
    """
    loss: Tensor = _AngleLoss.apply(ours, theirs)  # type: ignore[no-untyped-call]
    return loss


class _AngleLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ours: Tensor, theirs: Tensor) -> Tensor:
        size = len(ours)
        anchors = max(1, TILE // (size * max(size, ours.shape[1], theirs.shape[1])))
        total, gradient = ours.new_zeros(()), torch.zeros_like(ours)
        for start in range(0, size, anchors):
            tile = slice(start, start + anchors)
            value, part = _value_and_gradient(lambda x: _tile(x, theirs, tile), ours)  # noqa: B023 - used at once
            total += value
            gradient += part
        ctx.save_for_backward(gradient / size**3)
        return total / size**3

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return grads[0] * gradient, None


def _value_and_gradient(of: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        value = of(x)
        (gradient,) = torch.autograd.grad(value, x)
    return value.detach(), gradient


def _tile(ours: Tensor, theirs: Tensor, anchors: slice) -> Tensor:
    return F.smooth_l1_loss(_cosines(ours, anchors), _cosines(theirs, anchors), reduction="sum")


def _cosines(x: Tensor, anchors: slice) -> Tensor:
    """Return the cosines of the angles at each anchor j, (J, B, B)."""
    directions = F.normalize(x[None] - x[anchors, None], dim=2)
    return torch.bmm(directions, directions.mT)


RELATIONS = TermEntry(
    lambda shapes, options: Relations(),
    "distances and angles among pooled features",
    "Park et al., Relational Knowledge Distillation, CVPR 2019, equations 5 to 11",
    TAPS,
    relates=True,
)
