"""Networks by name.

To add a network, write a builder and an entry in NETS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from kdfast.errors import UsageError, unknown_name
from kdfast.nets.sources.libraries import build_library_net
from kdfast.nets.cifar.resnet import CifarResNet, Shortcut
from kdfast.nets.cifar.wrn import WideResNet

Builder = Callable[[int], nn.Module]

_RESNET_DEPTHS = (8, 14, 20, 32, 56, 110)


def _resnet(depth: int, shortcut: Shortcut) -> Builder:
    return partial(CifarResNet, depth, shortcut=shortcut)


NETS: dict[str, Builder] = {
    **{f"resnet{depth}": _resnet(depth, "B") for depth in _RESNET_DEPTHS},
    **{f"resnet{depth}a": _resnet(depth, "A") for depth in _RESNET_DEPTHS},
    "wrn_40_2": partial(WideResNet, 40, 2),
}
"""Name -> function of the number of classes that returns a newly initialized network."""


def build_net(name: str, classes: int) -> nn.Module:
    """Build a newly initialized network.

    Args:
        name: A key of NETS, or "torchvision:NAME" / "timm:NAME" if that package is installed.
        classes: Width of the output, at least 2.

    Raises:
        UsageError: There is no such network, its package is not installed or does not work with the installed torch, or
            `classes` is below 2.
    """
    if classes < 2:
        raise UsageError(f"`classes` is {classes}; a classifier needs at least 2")
    library, colon, member = name.partition(":")
    if colon:
        return build_library_net(library, member, classes)
    if name not in NETS:
        raise unknown_name("no network is named", name, [*NETS, "torchvision:NAME", "timm:NAME"])
    return NETS[name](classes)
