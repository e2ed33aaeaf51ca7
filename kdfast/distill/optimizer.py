"""SGD with a scheduled learning rate, which needs nothing from the CPU during a step on a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.distill.config import RunConfig
from kdfast.distill.schedule import compute_learning_rate


class ScheduledSGD:
    """SGD with momentum and the learning rate of each step.

    On a GPU it is one fused kernel, and the rate is a tensor that is read from a table of all steps, so that a CUDA
    graph of a step is valid for every step.

    Args:
        parameters: Parameters to train, on the device, or groups of them with settings of their own.
        config: Learning rate, momentum, weight decay and schedule.
        total_steps: Steps of the run.
        warmup_steps: Steps of linear warm-up.
        device: Device of the parameters.

    Attributes:
        sgd: The optimizer.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | list[dict[str, Any]],
        config: RunConfig,
        total_steps: int,
        warmup_steps: int,
        device: torch.device,
    ) -> None:
        self._schedule = (config.lr, config.schedule, total_steps, warmup_steps)
        on_device = runs_on_device(device)
        self.sgd = torch.optim.SGD(
            parameters,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            fused=on_device or None,
        )
        self._rate: Tensor | None = None
        if on_device:
            self._table = torch.tensor([self.rate(step) for step in range(total_steps)]).to(device)
            self._rate = torch.zeros((), device=device)
            self._set(self._rate)
            self._start_momentum()

    def rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        base, schedule, total, warmup = self._schedule
        return compute_learning_rate(base, schedule, step, total, warmup)

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

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the momentum; the settings stay those of this run and device."""
        settings = [{k: v for k, v in group.items() if k != "params"} for group in self.sgd.param_groups]
        self.sgd.load_state_dict(state)
        for group, own in zip(self.sgd.param_groups, settings, strict=True):
            group.update(own)

    def _set(self, rate: float | Tensor) -> None:
        for group in self.sgd.param_groups:
            group["lr"] = rate

    def _start_momentum(self) -> None:
        """Set the momentum to zero.

        The fused kernel would leave a momentum that it has not written uninitialized if it skipped the first step
        because of float16 overflow.
        """
        for group in self.sgd.param_groups:
            if group["momentum"]:
                for parameter in group["params"]:
                    self.sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def runs_on_device(device: torch.device) -> bool:
    """Return whether an update runs on the device alone: fused, with the learning rate in a tensor."""
    return device.type != "cpu"
