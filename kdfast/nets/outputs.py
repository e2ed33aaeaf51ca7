"""Let networks of other origin take and return what kdfast's do: images of three channels, and logits alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def adapt(net: nn.Module) -> nn.Module:
    """Let a network return its logits alone, and take images of three channels if it is made for one; in place.

    Hooks of the network do that: its modules keep their names, and its weights load unchanged. A second call does
    nothing.
    """
    if not type(net).__module__.startswith("kdfast.") and _unwrap not in net._forward_hooks.values():
        net.register_forward_hook(_unwrap)
    if input_channels(net) == 1 and _to_gray not in net._forward_pre_hooks.values():
        net.register_forward_pre_hook(_to_gray)
    return net


@contextmanager
def unchanged(*nets: nn.Module) -> Iterator[None]:
    """Undo, at the end of the block, what `adapt` and `eval` do to networks in it: their hooks, and their modes."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    hooks = [(held, set(held)) for net in nets for held in (net._forward_hooks, net._forward_pre_hooks)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for held, before in hooks:
            for key in held.keys() - before:
                del held[key]


def keep_hooks(net: nn.Module, other: nn.Module) -> nn.Module:
    """Return the other network, made from the first one, with the hooks of `adapt` that it has."""
    for hook in net._forward_pre_hooks.values():
        if hook is _to_gray:
            other.register_forward_pre_hook(_to_gray)
    for hook in net._forward_hooks.values():
        if hook is _unwrap:
            other.register_forward_hook(_unwrap)
    return other


def find_logits(output: Any) -> Any:
    """Return the logits of an output that has them under that name, beside others; any other output unchanged."""
    if isinstance(output, Tensor):
        return output
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    return logits if isinstance(logits, Tensor) else output


def _unwrap(_net: nn.Module, _inputs: tuple[Any, ...], output: Any) -> Any:
    return find_logits(output)


def _to_gray(_net: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    images, *rest = inputs
    return (images.mean(1, keepdim=True) if images.shape[1] == 3 else images, *rest)


def input_channels(net: nn.Module) -> int | None:
    """Return the channels that the first convolution of images takes; None without one."""
    first = next((module for module in net.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels
