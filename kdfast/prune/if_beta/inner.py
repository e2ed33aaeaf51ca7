"""The inner loop: K proxies, each trained on its own draw, in the same number of steps, together.

All start from the same parameters and walk through their draws in the same order of positions, so two draws that share
most samples also share most of the noise of training. The loss is `kdfast.kd_loss` on the K batches as one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import UsageError
from kdfast.ops.kd_loss import kd_loss
from kdfast.prune.if_beta.proxy import Proxy


@dataclass(frozen=True)
class Budget:
    """How each proxy is trained; the same for every draw of every policy.

    Attributes:
        steps: Steps of Adam.
        batch_size: Samples a step and proxy, drawn with repetition from the proxy's subset.
        lr: Learning rate at the start; it falls to zero along a cosine.
        weight_decay: L2 on all parameters, added to the gradient. A student underfits what the teacher knows; without a
            strong penalty the proxies do not, and ask for harder samples than students can use.
        alpha: Weight of the teacher's term in the loss. Together with `weight_decay` it was set by what real students
            made of subsets of CIFAR-10: more of the labels' term asks for harder or for only the easiest samples.
        temperature: Temperature of that term.
    """

    steps: int = 200
    batch_size: int = 128
    lr: float = 0.05
    weight_decay: float = 0.1
    alpha: float = 0.75
    temperature: float = 4.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1 or self.lr <= 0:
            raise UsageError(
                f"an inner loop of {self.steps} steps of {self.batch_size} samples with lr {self.lr}: all must be "
                "positive"
            )


@dataclass(frozen=True)
class Lesson:
    """What proxies learn from: inputs, labels and teacher logits of all samples, on one device.

    Attributes:
        x: float32 (N, d), the proxies' inputs.
        labels: int64 (N,).
        teacher: float32 (N, C), raw logits.
    """

    x: Tensor
    labels: Tensor
    teacher: Tensor

    def to(self, device: torch.device | str) -> Lesson:
        """The same on another device."""
        return Lesson(self.x.to(device), self.labels.to(device), self.teacher.to(device))

    def take(self, rows: Tensor) -> Lesson:
        """Some of the samples, rows int64 (n,)."""
        return Lesson(self.x[rows], self.labels[rows], self.teacher[rows])


def train(proxy: Proxy, lesson: Lesson, draws: IntArray, budget: Budget, seed: int, step: int) -> list[Tensor]:
    """Train one proxy on each draw.

    Args:
        proxy: The family of networks.
        lesson: The data.
        draws: int64 (K, m), rows of `lesson` that each proxy may see.
        budget: The training.
        seed: Seed of the initial parameters and of the order of samples, together with
        step: the step of the search; each step sees another order.

    Returns:
        The parameters, each with a leading axis K, without gradient.
    """
    count, size = draws.shape
    classes = lesson.teacher.shape[1]
    device = lesson.x.device
    key = int(hash64(Purpose.PROXY, seed, step)[0] >> np.uint64(1))
    single = proxy.start(lesson.x.shape[1], classes, key)
    parameters = [p.to(device).expand(count, *p.shape).clone().requires_grad_() for p in single]
    optimizer = torch.optim.Adam(parameters, budget.lr, weight_decay=budget.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, budget.steps)
    subsets = torch.from_numpy(draws).to(device)
    batch = min(budget.batch_size, size)
    places = torch.randint(size, (budget.steps, batch), generator=torch.Generator().manual_seed(key)).to(device)
    for step in range(budget.steps):
        rows = subsets[:, places[step]].reshape(-1)
        x = lesson.x[rows].view(count, batch, -1)
        logits = proxy.logits(parameters, x).reshape(-1, classes)
        # The sum over the proxies' means: each gets the gradient that it would get alone.
        loss = kd_loss(
            logits,
            lesson.labels[rows],
            lesson.teacher,
            rows,
            alpha=budget.alpha,
            temperature=budget.temperature,
            reduction="sum",
        )
        optimizer.zero_grad()
        (loss / batch).backward()
        optimizer.step()
        schedule.step()
    return [p.detach() for p in parameters]
