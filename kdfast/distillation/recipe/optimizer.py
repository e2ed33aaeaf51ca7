"""Optimizers with a scheduled learning rate, which need nothing from the CPU during a step on a GPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

# Where the step schedule divides the rate by ten, as fractions of the run: epochs 150, 180 and 210 of 240.
STEP_MILESTONES = (150 / 240, 180 / 240, 210 / 240)


def step_decay(progress: float) -> float:
    """Divide by 10 after 62.5%, 75% and 87.5% of the run, as RepDistiller does (epochs 150, 180, 210 of 240)."""
    return float(0.1 ** sum(progress >= m for m in STEP_MILESTONES))


def cosine(progress: float) -> float:
    """Decay from 1 to 0 along half a cosine."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(progress: float) -> float:
    """Do not decay."""
    return 1.0


LR_SCHEDULES: dict[str, Callable[[float], float]] = {"step": step_decay, "cosine": cosine, "constant": constant}


def compute_learning_rate(base: float, schedule: str, step: int, total: int, warmup: int = 0) -> float:
    """Return the learning rate of one step: a linear warm-up, then the schedule over the remaining steps.

    Args:
        base: Highest rate.
        schedule: A key of `LR_SCHEDULES`.
        step: Number of steps done.
        total: Number of steps of the run.
        warmup: Number of warm-up steps.
    """
    if step < warmup:
        return base * (step + 1) / warmup
    return base * LR_SCHEDULES[schedule]((step - warmup) / max(total - warmup, 1))


Groups: TypeAlias = "Iterable[nn.Parameter] | list[dict[str, Any]]"


def _sgd(groups: Groups, lr: float, momentum: float, decay: float, device: torch.device) -> Optimizer:
    # Not fused on a CPU, where that would round otherwise than earlier versions.
    fused = runs_on_device(device) or None
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=decay, fused=fused)


def _nesterov(groups: Groups, lr: float, momentum: float, decay: float, device: torch.device) -> Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, weight_decay=decay, nesterov=True, fused=True)


def _adamw(groups: Groups, lr: float, momentum: float, decay: float, device: torch.device) -> Optimizer:
    # A CUDA graph refuses an AdamW that does not say that it can be captured.
    capturable = device.type == "cuda"
    return torch.optim.AdamW(
        groups, lr=lr, betas=(momentum, 0.999), weight_decay=decay, fused=True, capturable=capturable
    )


OPTIMIZERS: dict[str, Callable[[Groups, float, float, float, torch.device], Optimizer]] = {
    "sgd": _sgd,
    "nesterov": _nesterov,
    "adamw": _adamw,
}
"""Name -> function of parameters, learning rate, momentum, weight decay and device that returns an optimizer."""


class ScheduledOptimizer:
    """An optimizer with the learning rate of each step.

    On a GPU it is one fused kernel, and the rate is a tensor that is read from a table of all steps, so that a CUDA
    graph of a step is valid for every step.

    Args:
        parameters: Parameters to train, on the device, or groups of them with settings of their own.
        rate: The learning rate of a step, counted from 0.
        total_steps: Steps of the run.
        kind: A key of `OPTIMIZERS`.
        momentum: In [0, 1); of AdamW, beta1.
        weight_decay: L2 penalty on every parameter; of AdamW, decoupled from the gradient.
        device: Device of the parameters.

    Attributes:
        rate: The learning rate of a step.
        inner: The optimizer.
    """

    def __init__(
        self,
        parameters: Groups,
        rate: Callable[[int], float],
        total_steps: int,
        *,
        kind: str = "sgd",
        momentum: float,
        weight_decay: float,
        device: torch.device,
    ) -> None:
        self.rate = rate
        on_device = runs_on_device(device)
        self.inner = OPTIMIZERS[kind](parameters, rate(0), momentum, weight_decay, device)
        self._rate: Tensor | None = None
        if on_device:
            self._table = torch.tensor([self.rate(step) for step in range(total_steps)]).to(device)
            self._rate = torch.zeros((), device=device)
            self._set(self._rate)
            self._start_momentum()

    def set_rate(self, step: int, step_on_device: Tensor) -> None:
        """Set the learning rate for a step; the two numbers are equal, and a GPU reads only the second.

        Args:
            step: Number of steps done.
            step_on_device: The same, int64 ().
        """
        if self._rate is not None:
            # Indexing by a scalar tensor would read it on the CPU.
            self._rate.copy_(self._table.index_select(0, step_on_device.view(1))[0])
            return
        self._set(self.rate(step))

    def parameters(self) -> list[nn.Parameter]:
        """Return all trained parameters."""
        return [parameter for group in self.inner.param_groups for parameter in group["params"]]

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the updates; the settings stay those of this run and device."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.inner.param_groups]
        self.inner.load_state_dict(state)
        for group, own in zip(self.inner.param_groups, settings, strict=True):
            group.update(own)

    def _set(self, rate: float | Tensor) -> None:
        for group in self.inner.param_groups:
            group["lr"] = rate

    def _start_momentum(self) -> None:
        """Set the momentum of SGD to zero.

        The fused kernel would leave a momentum that it has not written uninitialized if it skipped the first step
        because of float16 overflow.
        """
        for group in self.inner.param_groups:
            if group.get("momentum"):
                for parameter in group["params"]:
                    self.inner.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def runs_on_device(device: torch.device) -> bool:
    """Return whether an update runs on the device alone: fused, with the learning rate in a tensor."""
    return device.type != "cpu"
