"""Networks by name. A new network is one builder and one entry in NETS."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from functools import partial
from typing import cast

from torch import nn

from kdfast.errors import UsageError, did_you_mean
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
"""Name -> function of the number of classes that returns a freshly initialised network."""

_LIBRARIES = ("torchvision", "timm")


def build_net(name: str, classes: int) -> nn.Module:
    """Build a freshly initialised network.

    Args:
        name: A key of NETS, or "torchvision:NAME" / "timm:NAME" where that package is installed.
        classes: Width of the output, at least 2.

    Raises:
        UsageError: No such network (the nearest name is suggested), the package is not installed, or classes < 2.
    """
    if classes < 2:
        raise UsageError(f"a classifier needs at least 2 classes; got {classes}")
    library, colon, member = name.partition(":")
    if colon:
        return _from_library(library, member, classes)
    if name not in NETS:
        hint = did_you_mean(name, NETS)
        raise UsageError(f"no network is named {name!r}: {hint}known: {', '.join(NETS)}, torchvision:NAME, timm:NAME")
    return NETS[name](classes)


def _from_library(library: str, member: str, classes: int) -> nn.Module:
    if library not in _LIBRARIES:
        raise UsageError(f"{library!r} is no library of networks: use torchvision:NAME or timm:NAME")
    try:
        package = importlib.import_module("torchvision.models" if library == "torchvision" else "timm")
    except ImportError as error:
        raise UsageError(f"{library}:{member} needs the package {library}: pip install {library}") from error
    names = list(package.list_models())
    if member not in names:
        near = difflib.get_close_matches(member, names, n=3, cutoff=0.4)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UsageError(f"{library} has no network named {member!r}{hint}")
    if library == "torchvision":
        return cast(nn.Module, package.get_model(member, weights=None, num_classes=classes))
    return cast(nn.Module, package.create_model(member, pretrained=False, num_classes=classes))
