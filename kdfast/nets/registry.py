"""Networks by name.

To add a network, write a builder and an entry in NETS.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import cast

from torch import nn

from kdfast.errors import UsageError, did_you_mean, unknown_name
from kdfast.nets.resnet import CifarResNet, Shortcut
from kdfast.nets.wrn import WideResNet

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

_LIBRARIES = ("torchvision", "timm")


def build_net(name: str, classes: int) -> nn.Module:
    """Build a newly initialized network.

    Args:
        name: A key of NETS, or "torchvision:NAME" / "timm:NAME" if that package is installed.
        classes: Width of the output, at least 2.

    Raises:
        UsageError: There is no such network, the package is not installed, or `classes` is below 2.
    """
    if classes < 2:
        raise UsageError(f"`classes` is {classes}; a classifier needs at least 2")
    library, colon, member = name.partition(":")
    if colon:
        return _from_library(library, member, classes)
    if name not in NETS:
        raise unknown_name("no network is named", name, [*NETS, "torchvision:NAME", "timm:NAME"])
    return NETS[name](classes)


def _from_library(library: str, member: str, classes: int) -> nn.Module:
    if library not in _LIBRARIES:
        raise UsageError(f"no library of networks is named {library!r}: use torchvision:NAME or timm:NAME")
    try:
        package = importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
    except ImportError as error:
        raise UsageError(f"{library}:{member} needs the package {library}: pip install {library}") from error
    names = list(package.list_models())
    if member not in names:
        raise UsageError(
            f"{library} has no network named {member!r}: {did_you_mean(member, names)}see its list_models()"
        )
    if library == "torchvision":
        return cast(nn.Module, package.get_model(member, weights=None, num_classes=classes))
    return cast(nn.Module, package.create_model(member, pretrained=False, num_classes=classes))
