"""The settings of one training run: what `kdfast distill` and `kdfast teacher train` are told, checked and resolved."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from kdfast.distill.schedule import LR_SCHEDULES
from kdfast.errors import UsageError
from kdfast.ops.kd_loss.validation import check_temperature


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides the weights a run ends with, given the data.

    The defaults are the recipe of RepDistiller (Tian et al., Contrastive Representation Distillation, ICLR 2020) that
    the pruning paper trains with.

    Attributes:
        student: Name of the network, a key of `kdfast.nets.NETS` or `torchvision:NAME` / `timm:NAME`.
        epochs: Passes over the subset.
        batch_size: Samples a step; the last, smaller batch of an epoch is kept.
        lr: Highest learning rate.
        momentum: SGD momentum in [0, 1), without Nesterov.
        weight_decay: L2 on every parameter.
        schedule: A key of `LR_SCHEDULES`.
        warmup_epochs: Epochs of linear warm-up.
        alpha: Weight of the teacher's term in [0, 1]; 0 is plain training.
        temperature: Temperature of the teacher's term, > 0.
        views: Augmentation views a sample may be seen in; 0 means all of them.
        view_seed: Seed of the choice of those views; None, before it is resolved: the cache's, or 0.
        precision: `fp32`, or `bf16` / `fp16` for automatic mixed precision.
        seed: Seed of the initial weights, of the order and of the views.
    """

    student: str
    epochs: int = 240
    batch_size: int = 64
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: str = "step"
    warmup_epochs: float = 0.0
    alpha: float = 0.0
    temperature: float = 4.0
    views: int = 0
    view_seed: int | None = None
    precision: str = "fp32"
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("--epochs", self.epochs, 1)
        _at_least("--batch-size", self.batch_size, 2)
        _at_least("--views", self.views, 0)
        _at_least("--seed", self.seed, 0)
        _at_least("--view-seed", self.view_seed or 0, 0)
        for flag, value in (
            ("--lr", self.lr),
            ("--momentum", self.momentum),
            ("--weight-decay", self.weight_decay),
            ("--warmup-epochs", self.warmup_epochs),
        ):
            if not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{flag} is {value}; needed: a finite number, not negative")
        if self.momentum >= 1:
            raise UsageError(f"--momentum is {self.momentum}; needed: a number in [0, 1)")
        if self.warmup_epochs > self.epochs:
            raise UsageError(f"--warmup-epochs is {self.warmup_epochs} of {self.epochs} epochs; lower it")
        check_temperature(self.temperature, name="--temperature", error=UsageError)
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"--alpha is {self.alpha}; needed: a number in [0, 1], or auto")
        _one_of("--schedule", self.schedule, tuple(LR_SCHEDULES))
        _one_of("--precision", self.precision, ("fp32", "bf16", "fp16"))

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values."""
        return dataclasses.asdict(self)


def _at_least(flag: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{flag} is {value}; needed: a whole number of at least {least}")


def _one_of(flag: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UsageError(f"{flag} is {value!r}; needed: one of {', '.join(allowed)}")
