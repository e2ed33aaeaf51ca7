"""The exponential moving average of a network's weights, which is what is evaluated and saved."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """An average of a network's weights and floating-point buffers over the steps.

    After step t, counted from 0, the average becomes d average + (1 - d) weights with d = min(decay, (1 + t) / (10 +
    t)), so that the first weights are soon forgotten in a short run. Statistics of batch norms are averaged likewise;
    integer buffers are copied.

    Args:
        net: The network, on its device.
        decay: In (0, 1).

    Attributes:
        net: A network with the averages as its weights.
    """

    def __init__(self, net: nn.Module, decay: float) -> None:
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self._decay = decay
        pairs = list(zip(_tensors(self.net), _tensors(net), strict=True))
        averaged = [(own, given) for own, given in pairs if own.is_floating_point()]
        self._averages, self._weights = [own for own, _ in averaged], [given for _, given in averaged]
        self._copies = [(own, given) for own, given in pairs if not own.is_floating_point()]

    @torch.no_grad()
    def update(self, step: Tensor) -> None:
        """Add the network's weights after a step.

        Args:
            step: int64 (), the number of steps done before it, on the network's device.
        """
        count = step.double()
        share = 1 - ((1 + count) / (10 + count)).clamp(max=self._decay)
        change = torch._foreach_sub(self._weights, self._averages)
        torch._foreach_mul_(change, share.float())
        torch._foreach_add_(self._averages, change)
        for own, given in self._copies:
            own.copy_(given)


def _tensors(net: nn.Module) -> list[Tensor]:
    return [*net.parameters(), *net.buffers()]
