"""The proxies: small networks over the teacher's features, many of one shape trained side by side.

On the teacher's own features a full linear head reproduces the teacher exactly, whatever it is trained on: the
divergence reaches zero for every sample drawn and says nothing. So a proxy is limited, by a fixed random projection to
fewer dimensions under a linear head, or by a narrow hidden layer. Every parameter carries a leading axis of K proxies,
and every layer is one batched matrix product.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kdfast.errors import UsageError


class Proxy(Protocol):
    """A family of K equally shaped networks from features to logits."""

    def inputs(self, features: Tensor, seed: int) -> Tensor:
        """What the networks read, float32 (N, d), made once from the teacher's features (N, D)."""

    def start(self, width: int, classes: int, seed: int) -> list[Tensor]:
        """Initial parameters of one network that reads `width` numbers; all K start from them."""

    def logits(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """Logits (K, B, C) of the K networks for x, (K, B, d); parameters have a leading axis K."""


@dataclass(frozen=True)
class Projection:
    """A linear head on a fixed random projection of the standardised features.

    Attributes:
        width: d', below the features' D; None: D / 4.
    """

    width: int | None = None

    def inputs(self, features: Tensor, seed: int) -> Tensor:
        """Project and scale to unit variance in total; a constant 1 is appended, for the bias.

        Raises:
            UsageError: The width is not below D: such a proxy reproduces the teacher whatever it is trained on.
        """
        most = features.shape[1]
        width = max(2, most // 4) if self.width is None else self.width
        if not 1 <= width < max(most, 3):
            raise UsageError(f"a projection of {most} features to width {width}: give a width from 1 to {most - 1}")
        return _with_one(_project(features, width, seed))

    def start(self, width: int, classes: int, seed: int) -> list[Tensor]:
        """Zero weights: the loss is convex, and nothing depends on a draw."""
        return [torch.zeros(width, classes)]

    def logits(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """`x W`."""
        return torch.bmm(x, parameters[0])


@dataclass(frozen=True)
class Bottleneck:
    """A perceptron with one narrow hidden layer (ReLU) on the standardised features.

    Attributes:
        hidden: Width of the hidden layer.
    """

    hidden: int = 8

    def inputs(self, features: Tensor, seed: int) -> Tensor:
        """Standardised features, with a constant 1 for the bias."""
        return _with_one(_standardised(features))

    def start(self, width: int, classes: int, seed: int) -> list[Tensor]:
        """Kaiming-normal first layer from the seed, small second layer."""
        draw = torch.Generator().manual_seed(seed)
        first = torch.randn(width, self.hidden, generator=draw) * (2 / width) ** 0.5
        second = torch.randn(self.hidden + 1, classes, generator=draw) * (1 / self.hidden) ** 0.5
        return [first, second]

    def logits(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """`[relu(x W1), 1] W2`."""
        hidden = torch.bmm(x, parameters[0]).relu()
        return torch.baddbmm(parameters[1][:, -1:], hidden, parameters[1][:, :-1])


PROXIES: dict[str, Callable[[], Proxy]] = {"projection": Projection, "bottleneck": Bottleneck}


def _standardised(features: Tensor) -> Tensor:
    spread, mean = torch.std_mean(features, 0, correction=0)
    return (features - mean) / torch.where(spread > 0, spread, 1)


def _project(features: Tensor, width: int, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(features.shape[1], features.shape[1], generator=draw))[0]
    return _standardised(_standardised(features) @ directions[:, :width])


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
