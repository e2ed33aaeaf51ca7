"""Rewards: how well a trained proxy does on the held-out part, higher = better."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.kd_loss import kd_loss_terms
from kdfast.prune.if_beta.inner import Lesson
from kdfast.prune.if_beta.proxy import Proxy

FloatArray = NDArray[np.float64]


class Reward(Protocol):
    """Judges proxies by their logits on the held-out part."""

    def __call__(self, logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """One number a row.

        Args:
            logits: float32 (n, C) of one proxy.
            labels: int64 (n,).
            teacher: float32 (n, C), the teacher's logits.
            temperature: That of the inner loss.

        Returns:
            float32 (n,), higher = better; a proxy's reward is the mean.
        """


def kd_reward(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """-(CE + T^2 KL(teacher || proxy) at T): twice the inner loss at alpha = 1/2."""
    ce, kl = kd_loss_terms(logits, labels, teacher, temperature=temperature)
    return -(ce + temperature**2 * kl)


def ce_reward(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """-CE with the labels."""
    return -kd_loss_terms(logits, labels, teacher, temperature=temperature)[0]


def kl_reward(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """-T^2 KL(teacher || proxy) at T."""
    return -(temperature**2) * kd_loss_terms(logits, labels, teacher, temperature=temperature)[1]


def accuracy_reward(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """1 where the proxy's first class is the label."""
    return (logits.argmax(1) == labels).float()


REWARDS: dict[str, Reward] = {"kd": kd_reward, "ce": ce_reward, "kl": kl_reward, "accuracy": accuracy_reward}


def judge(
    proxy: Proxy, parameters: list[Tensor], lesson: Lesson, temperature: float, rewards: list[Reward]
) -> FloatArray:
    """The rewards of trained proxies on held-out data.

    Args:
        proxy: The family of networks.
        parameters: Theirs, with a leading axis K.
        lesson: The held-out data, (n, ...).
        temperature: That of the inner loss.
        rewards: The rewards to compute.

    Returns:
        float64 (len(rewards), K).

    Raises:
        ShapeError: A reward does not give one number a row.
    """
    values = []
    with torch.no_grad():
        # One proxy at a time: a few thousand held-out rows of a thousand classes, K times, would not fit.
        for k in range(len(parameters[0])):
            logits = proxy.logits([p[k : k + 1] for p in parameters], lesson.x[None])[0]
            rows = [_rows(reward, logits, lesson, temperature) for reward in rewards]
            values.append(torch.stack([row.double().mean() for row in rows]))
    return torch.stack(values, 1).cpu().numpy()


def _rows(reward: Reward, logits: Tensor, lesson: Lesson, temperature: float) -> Tensor:
    rows = reward(logits, lesson.labels, lesson.teacher, temperature)
    if not isinstance(rows, Tensor) or rows.shape != lesson.labels.shape:
        given = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ShapeError(f"the reward gives {given}: a tensor ({len(lesson.labels)},), one number a row, is needed")
    return rows
