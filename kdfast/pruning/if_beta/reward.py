"""Rewards: measures of a trained proxy on the held-out set, higher = better."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.kd_loss import kd_loss_terms
from kdfast.pruning.if_beta.proxy import Proxy, ProxyData
from kdfast.pruning.rules.base import FloatArray


class Reward(Protocol):
    """A function of a proxy's logits on the held-out set."""

    def __call__(self, logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        """Return one number per row; a proxy's reward is their mean.

        Args:
            logits: float32 (n, C) of one proxy.
            labels: int64 (n,).
            teacher: float32 (n, C), the teacher's logits.
            temperature: Temperature of the proxies' training loss.

        Returns:
            float32 (n,), higher = better.
        """


def kd_reward(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return -(CE + T^2 KL(teacher || proxy) at T): minus twice the training loss at alpha = 1/2."""
    ce, kl = kd_loss_terms(logits, labels, teacher, temperature=temperature)
    return -(ce + temperature**2 * kl)


def ce_reward(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return minus the cross-entropy with the labels."""
    return -kd_loss_terms(logits, labels, teacher, temperature=temperature)[0]


def kl_reward(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return -T^2 KL(teacher || proxy) at T."""
    return -(temperature**2) * kd_loss_terms(logits, labels, teacher, temperature=temperature)[1]


def accuracy_reward(logits: Tensor, labels: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return 1 where the proxy predicts the label, else 0."""
    return (logits.argmax(1) == labels).float()


REWARDS: dict[str, Reward] = {"kd": kd_reward, "ce": ce_reward, "kl": kl_reward, "accuracy": accuracy_reward}


def mean_rewards(
    proxy: Proxy, parameters: list[Tensor], data: ProxyData, temperature: float, rewards: list[Reward]
) -> FloatArray:
    """Compute the mean rewards of trained proxies.

    Args:
        proxy: The proxies' architecture.
        parameters: Their parameters, with a leading axis K.
        data: The held-out samples, (n, ...).
        temperature: Temperature of the proxies' training loss.
        rewards: The rewards to compute.

    Returns:
        float64 (len(rewards), K).

    Raises:
        ShapeError: A reward does not return one number per row.
    """
    values = []
    with torch.no_grad():
        # One proxy at a time, to bound the memory: there may be thousands of held-out rows and 1,000 classes.
        for k in range(len(parameters[0])):
            logits = proxy.forward([p[k : k + 1] for p in parameters], data.x[None])[0]
            rows = [_per_row(reward, logits, data, temperature) for reward in rewards]
            values.append(torch.stack([row.double().mean() for row in rows]))
    return torch.stack(values, 1).cpu().numpy()


def _per_row(reward: Reward, logits: Tensor, data: ProxyData, temperature: float) -> Tensor:
    rows = reward(logits, data.labels, data.teacher_logits, temperature)
    if not isinstance(rows, Tensor) or rows.shape != data.labels.shape:
        given = f"shape {tuple(rows.shape)}" if isinstance(rows, Tensor) else type(rows).__name__
        raise ShapeError(f"the reward returned {given}: return a tensor ({len(data.labels)},), one number per row")
    return rows
