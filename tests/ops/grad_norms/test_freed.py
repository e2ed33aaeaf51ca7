"""Nothing of a pass outlives it: thousands of batches must not fill the memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import kdfast
from kdfast.ops.grad_norms.recording.capture import Call


class Net(nn.Module):
    """Layers with formulas, and a parameter that is followed through operations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear((self.norm(self.conv(x)).relu() * self.scale).mean((2, 3)))


def calls_alive() -> int:
    return sum(issubclass(type(each), Call) for each in gc.get_objects())


@pytest.mark.parametrize("n", [1, 4, 7])
def test_recorded_calls_are_freed_without_garbage_collection(n: int) -> None:
    """With 4 samples, as many as channels, a pass on a few samples is recorded too."""
    net, x, y = Net().eval(), torch.randn(n, 3, 6, 6), torch.arange(n) % 3
    metric = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    gc.collect()
    gc.disable()
    try:
        kdfast.grad_norms(net, x, y)
        kdfast.grad_norms(net, x, y, metric=metric)
        kdfast.fisher_diagonal(net, [(x, y)])
        kdfast.grad_dots(net, x, y, metric)
        assert calls_alive() == 0
    finally:
        gc.enable()
