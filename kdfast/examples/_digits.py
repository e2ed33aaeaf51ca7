"""Parts shared by the image examples: scikit-learn's digits, a small network, and a teacher's cached logits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

CLASSES = 10


class Digits(NamedTuple):
    """Images (N, 64) in [0, 1], float32, and their classes (N,), int64."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    @property
    def indexed(self) -> TensorDataset:
        """Training samples as (image, class, index); a subset keeps the indices of the full set."""
        return TensorDataset(self.x, self.y, torch.arange(len(self.x)))


def digits(train: int = 1400) -> Digits:
    """Load the digits: the first ``train`` images for training, the others for testing."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
    return Digits(x[:train], y[:train], x[train:], y[train:])


def mlp(width: int) -> nn.Sequential:
    """Build a network with one hidden layer: (N, 64) -> (N, 10)."""
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, CLASSES))


def cached_logits(data: Digits, steps: int = 150) -> Tensor:
    """Train a teacher and return its logits for the training samples: (N, 10) float16, row i for sample i."""
    torch.manual_seed(0)
    teacher = mlp(256)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        functional.cross_entropy(teacher(data.x), data.y).backward()
        optimizer.step()
    with torch.no_grad():
        logits: Tensor = teacher(data.x)
    return logits.half()


@torch.no_grad()
def accuracy(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images classified correctly."""
    return float((net(x).argmax(1) == y).float().mean())
