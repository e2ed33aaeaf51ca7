"""The classifier (last linear layer) of a network, and its input features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kdfast.errors import CheckpointError, ShapeError, UsageError
from kdfast.ops.float32 import full_float32


def find_classifier(net: nn.Module) -> nn.Linear:
    """Return the last ``nn.Linear`` of a network in the order of its modules, which computes the logits.

    Raises:
        UsageError: The network has no linear layer.
    """
    last = None
    for module in net.modules():
        if isinstance(module, nn.Linear):
            last = module
    if last is None:
        raise UsageError(f"{type(net).__name__} has no nn.Linear: pass a network that ends in a linear classifier")
    return last


@torch.no_grad()
def reorder_classifier(net: nn.Module, name: str, order: Sequence[int]) -> None:
    """Let logit i be what was logit order[i].

    Args:
        net: A network that ends in a linear layer.
        name: Its name, for the message.
        order: A permutation of the classes.

    Raises:
        CheckpointError: The last linear layer has another width, so it does not compute the logits.
        UsageError: The network has no linear layer.
    """
    head = find_classifier(net)
    if head.out_features != len(order):
        raise CheckpointError(
            f"the last linear layer of {name} does not compute its logits, so its classes cannot be reordered: rename "
            "the classes of the data"
        )
    index = torch.tensor(order, device=head.weight.device)
    head.weight.copy_(head.weight[index])
    if head.bias is not None:
        head.bias.copy_(head.bias[index])


def forward_with_features(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Run one forward pass, and also return the input of the classifier.

    Args:
        net: A network that ends in a linear layer.
        x: Images (B, 3, h, w).

    Returns:
        Logits (B, C) and features (B, D), with ``logits == features @ W.T + b`` for the classifier's W and b.

    Raises:
        UsageError: The network has no linear layer.
        ShapeError: The classifier did not run exactly once on a (B, D) tensor.
    """
    seen: list[Tensor] = []

    def record(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.append(inputs[0])

    handle = find_classifier(net).register_forward_pre_hook(record)
    try:
        logits = net(x)
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].ndim != 2:
        shapes = [tuple(t.shape) for t in seen]
        raise ShapeError(f"the classifier of {type(net).__name__} must run once on (B, D) features; it ran on {shapes}")
    return logits, seen[0]


class LinearHead(NamedTuple):
    """The last layer of a network on its features.

    Attributes:
        weight: float32 (C, D).
        bias: float32 (C,).
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def of(cls, net: nn.Module) -> LinearHead:
        """Return a copy of a network's classifier, on the CPU.

        Raises:
            UsageError: The network has no linear layer.
        """
        layer = find_classifier(net)
        weight = layer.weight.detach().float().cpu().clone()
        bias = torch.zeros(len(weight)) if layer.bias is None else layer.bias.detach().float().cpu().clone()
        return cls(weight, bias)

    @classmethod
    def from_array(cls, values: NDArray[np.float32]) -> LinearHead:
        """Return the head that `as_array` returned."""
        both = torch.from_numpy(np.array(values))
        return cls(both[:, :-1].contiguous(), both[:, -1].contiguous())

    def as_array(self) -> NDArray[np.float32]:
        """Return weight and bias as one array (C, D + 1), the bias last."""
        values: NDArray[np.float32] = torch.cat([self.weight, self.bias[:, None]], 1).cpu().numpy()
        return values

    def to(self, device: torch.device) -> LinearHead:
        """Return the head on a device."""
        return LinearHead(self.weight.to(device), self.bias.to(device))

    @torch.no_grad()
    @full_float32()
    def logits(self, features: Tensor) -> Tensor:
        """Return the logits of features (n, D) of any floating dtype, float32 (n, C)."""
        with torch.autocast(features.device.type, enabled=False):
            return torch.addmm(self.bias, features.float(), self.weight.t())


@torch.no_grad()
def check_linear_head(net: nn.Module, name: str, size: tuple[int, int]) -> None:
    """Check that a network's logits are its last linear layer's output on a vector of features for each image.

    Args:
        net: A network in evaluation mode.
        name: Its name, for the message.
        size: Height and width of its images.

    Raises:
        UsageError: They are not.
    """
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    parameter = next(net.parameters())
    try:
        with full_float32():
            found, features = forward_with_features(net, images.to(parameter.device, parameter.dtype))
        computed = LinearHead.of(net).logits(features.cpu())
        close = computed.shape == found.shape and torch.allclose(computed, found.float().cpu(), rtol=1e-3, atol=1e-3)
    except (UsageError, ShapeError):
        close = False
    if not close:
        raise UsageError(
            f"`kind` is features, and the logits of {name} are not those of one last linear layer on pooled features: "
            "omit it, which caches the logits"
        )
