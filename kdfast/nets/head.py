"""The classifier (last linear layer) of a network, and its input features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import CheckpointError, ShapeError, UsageError


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
