"""What several terms on activations share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.distillation.losses.base import Shape


def match_sizes(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average the larger of two maps (B, C, h, w) down to the height and the width of the smaller."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return _resize(a, size), _resize(b, size)


def attention_map(x: Tensor) -> Tensor:
    """Return the normalized mean of the squares over the channels, (B, C, h, w) -> (B, h * w)."""
    return F.normalize(x.square().mean(1).flatten(1))


def connector(student: Shape, teacher: Shape, *, relu: bool) -> nn.Sequential:
    """Return a 1x1 convolution with batch norm from the student's channels to the teacher's."""
    layers: list[nn.Module] = [nn.Conv2d(student[0], teacher[0], 1, bias=False), nn.BatchNorm2d(teacher[0])]
    return nn.Sequential(*layers, *([nn.ReLU()] if relu else []))


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if tuple(x.shape[2:]) == size else F.adaptive_avg_pool2d(x, size)


def pairwise_distances(x: Tensor) -> Tensor:
    """Return Euclidean distances, (B, D) -> (B, B); its gradient is 0 on the diagonal, where the root has none.

    The inner products are accurate to float32's rounding of the squared norms, so equal rows may have a small distance.
    """
    squares = x.square().sum(1)
    distances = (squares[:, None] + squares[None] - 2 * x @ x.T).clamp_min(1e-12).sqrt()
    return distances * (1 - torch.eye(len(x), dtype=x.dtype, device=x.device))
