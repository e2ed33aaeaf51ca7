"""Proxies: small students on the teacher's features, trained many at a time, one per drawn subset.

A full linear head on the teacher's own features can reproduce the teacher exactly from any training set: the divergence
reaches zero on every drawn sample, so the reward carries no information. Therefore a proxy has limited capacity: a
linear head on a fixed random projection to fewer dimensions, or a narrow hidden layer. Or it is trained briefly, for
one pass over its subset: `Linear`. Every parameter has a leading axis of K proxies, and every layer is one batched
matrix product.

All K proxies start from the same parameters and visit the positions of their subsets in the same order, so two subsets
that share most samples also share most of the training noise. The loss is one `kdfast.kd_loss` over the K batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import UsageError
from kdfast.ops.kd_loss import kd_loss


class Proxy(Protocol):
    """An architecture from features to logits, evaluated for K sets of parameters at a time."""

    def transform(self, features: Tensor, seed: int) -> Tensor:
        """Return the networks' inputs, float32 (N, d), computed once from the teacher's features (N, D)."""

    def init_parameters(self, width: int, classes: int, seed: int) -> list[Tensor]:
        """Return initial parameters for inputs of `width` numbers; all K networks start from them."""

    def forward(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """Return logits (K, B, C) for inputs (K, B, d); the parameters have a leading axis K."""


@dataclass(frozen=True)
class Projection:
    """A linear head on a fixed random projection of the standardized features.

    Attributes:
        width: Dimension of the projection, below the dimension D of the features; None for D / 4.
    """

    width: int | None = None

    def transform(self, features: Tensor, seed: int) -> Tensor:
        """Project, scale each dimension to unit variance, and append a constant 1 for the bias.

        Raises:
            UsageError: The width is not below D: such a proxy reproduces the teacher from any subset.
        """
        dim = features.shape[1]
        width = max(2, dim // 4) if self.width is None else self.width
        if not 1 <= width < max(dim, 3):
            raise UsageError(f"`width` is {width} for a projection of {dim} features: pass a width from 1 to {dim - 1}")
        return _append_one(_project(features, width, seed))

    def init_parameters(self, width: int, classes: int, seed: int) -> list[Tensor]:
        """Return zero weights: the loss is convex, so the start does not matter."""
        return [torch.zeros(width, classes)]

    def forward(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """Return `x W`."""
        return torch.bmm(x, parameters[0])


@dataclass(frozen=True)
class Bottleneck:
    """A perceptron with one narrow hidden layer (ReLU) on the standardized features.

    Attributes:
        hidden: Width of the hidden layer.
    """

    hidden: int = 8

    def transform(self, features: Tensor, seed: int) -> Tensor:
        """Standardize and append a constant 1 for the bias."""
        return _append_one(_standardize(features))

    def init_parameters(self, width: int, classes: int, seed: int) -> list[Tensor]:
        """Return a Kaiming-normal first layer and a small second layer."""
        generator = torch.Generator().manual_seed(seed)
        first = torch.randn(width, self.hidden, generator=generator) * (2 / width) ** 0.5
        second = torch.randn(self.hidden + 1, classes, generator=generator) * (1 / self.hidden) ** 0.5
        return [first, second]

    def forward(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """Return `[relu(x W1), 1] W2`."""
        hidden = torch.bmm(x, parameters[0]).relu()
        return torch.baddbmm(parameters[1][:, -1:], hidden, parameters[1][:, :-1])


@dataclass(frozen=True)
class Linear:
    """A linear head on all standardized features, to be trained for one pass: it does not limit the capacity.

    Not in `PROXIES`, whose entries can be trained to the end.
    """

    def transform(self, features: Tensor, seed: int) -> Tensor:
        """Standardize and append a constant 1 for the bias."""
        return _append_one(_standardize(features))

    def init_parameters(self, width: int, classes: int, seed: int) -> list[Tensor]:
        """Return zero weights."""
        return [torch.zeros(width, classes)]

    def forward(self, parameters: list[Tensor], x: Tensor) -> Tensor:
        """Return `x W`."""
        return torch.bmm(x, parameters[0])


PROXIES: dict[str, Callable[[], Proxy]] = {"projection": Projection, "bottleneck": Bottleneck}


@dataclass(frozen=True)
class ProxyTrainingConfig:
    """Training settings of each proxy, equal for all draws of all policies.

    Attributes:
        steps: Number of Adam steps; None: one pass over the subset, without replacement, at a constant learning rate.
        batch_size: Samples per step and proxy, drawn with replacement from its subset if there are `steps`.
        lr: Initial learning rate; it decays to zero along a cosine if there are `steps`.
        weight_decay: L2 penalty on all parameters, added to the gradient. Students underfit the teacher; without a
            strong penalty the proxies do not, and then favor harder samples than students benefit from.
        alpha: Weight of the teacher's term in the loss. `alpha` and `weight_decay` were chosen by the accuracy of real
            students on subsets of CIFAR-10: a smaller alpha favors harder samples or only the easiest ones.
        temperature: Temperature of the teacher's term.
    """

    steps: int | None = 200
    batch_size: int = 128
    lr: float = 0.05
    weight_decay: float = 0.1
    alpha: float = 0.75
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if (self.steps is not None and self.steps < 1) or self.batch_size < 1 or self.lr <= 0:
            raise UsageError(
                f"ProxyTrainingConfig has steps {self.steps}, batch_size {self.batch_size} and lr {self.lr}: pass "
                "positive values"
            )


@dataclass(frozen=True)
class ProxyData:
    """Training data of the proxies, on one device.

    Attributes:
        x: float32 (N, d), inputs of the proxies.
        labels: int64 (N,).
        teacher_logits: float32 (N, C).
    """

    x: Tensor
    labels: Tensor
    teacher_logits: Tensor

    def to(self, device: torch.device | str) -> ProxyData:
        """Return a copy on another device."""
        return ProxyData(self.x.to(device), self.labels.to(device), self.teacher_logits.to(device))

    def select(self, rows: Tensor) -> ProxyData:
        """Return the samples `rows`, int64 (n,)."""
        return ProxyData(self.x[rows], self.labels[rows], self.teacher_logits[rows])


def train_proxies(
    proxy: Proxy, data: ProxyData, draws: IntArray, budget: ProxyTrainingConfig, seed: int, step: int
) -> list[Tensor]:
    """Train one proxy on each drawn subset.

    Args:
        proxy: The architecture.
        data: All training samples.
        draws: int64 (K, m), the rows of `data` that each proxy is trained on.
        budget: Training settings.
        seed: Seed of the search.
        step: Step of the search; seed and step determine the initial parameters and the order of the samples.

    Returns:
        The parameters, each with a leading axis K, detached.
    """
    count, size = draws.shape
    classes = data.teacher_logits.shape[1]
    device = data.x.device
    key = int(hash64(Purpose.PROXY, seed, step)[0] >> np.uint64(1))
    initial = proxy.init_parameters(data.x.shape[1], classes, key)
    parameters = [p.to(device).expand(count, *p.shape).clone().requires_grad_() for p in initial]
    # One launch per step on a GPU; None is PyTorch's choice, which searches on a CPU reproduce.
    fused = True if device.type == "cuda" else None
    optimizer = torch.optim.Adam(parameters, budget.lr, weight_decay=budget.weight_decay, fused=fused)
    schedule = None
    if budget.steps is not None:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    batch = min(budget.batch_size, size)
    order = _order(size, None if budget.steps is None else budget.steps * batch, key).to(device)
    for part in torch.split(torch.from_numpy(draws).to(device)[:, order], batch, 1):
        rows = part.reshape(-1)
        x = data.x[rows].view(*part.shape, -1)
        logits = proxy.forward(parameters, x).reshape(-1, classes)
        # The sum over the proxies of their batch means: each proxy gets the gradient of its own mean loss.
        loss = kd_loss(
            logits,
            data.labels[rows],
            data.teacher_logits,
            rows,
            alpha=budget.alpha,
            temperature=budget.temperature,
            reduction="sum",
        )
        optimizer.zero_grad()
        torch.autograd.backward(loss / part.shape[1])
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return [p.detach() for p in parameters]


def _order(size: int, length: int | None, key: int) -> Tensor:
    """Return the positions of a subset in the order of training: `length` with replacement, or each of them once."""
    generator = torch.Generator().manual_seed(key)
    if length is None:
        return torch.randperm(size, generator=generator)
    return torch.randint(size, (length,), generator=generator)


def _standardize(features: Tensor) -> Tensor:
    spread, mean = torch.std_mean(features, 0, correction=0)
    return (features - mean) / torch.where(spread > 0, spread, 1)


def _project(features: Tensor, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(features.shape[1], features.shape[1], generator=generator))[0]
    return _standardize(_standardize(features) @ directions[:, :width].to(features.device))


def _append_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], 1)
