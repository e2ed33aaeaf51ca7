"""Networks by name.

To add a network, write a builder and an entry in NETS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from kdfast.errors import KdfastError, UsageError, unknown_name
from kdfast.nets.cifar.deep_resnet import DeepResNet
from kdfast.nets.cifar.mobilenetv2 import MobileNetV2
from kdfast.nets.cifar.resnet import CifarResNet, Shortcut
from kdfast.nets.cifar.vgg import VGG
from kdfast.nets.cifar.wrn import WideResNet
from kdfast.nets.outputs import adapt
from kdfast.nets.sources.hugging_face import build_hugging_face_net
from kdfast.nets.sources.libraries import build_library_net, first_line
from kdfast.nets.sources.own_code import build_own_net
from kdfast.nets.sources.spec import FORMS, NetSpec, add_arguments, parse_spec

Builder = Callable[..., nn.Module]

_RESNET_DEPTHS = (8, 14, 20, 32, 56, 110)


def _resnet(depth: int, shortcut: Shortcut) -> Builder:
    return partial(CifarResNet, depth, shortcut=shortcut)


NETS: dict[str, Builder] = {
    **{f"resnet{depth}": _resnet(depth, "B") for depth in _RESNET_DEPTHS},
    **{f"resnet{depth}a": _resnet(depth, "A") for depth in _RESNET_DEPTHS},
    **{f"resnet{depth}x4": partial(CifarResNet, depth, widths=(32, 64, 128, 256)) for depth in (8, 32)},
    "resnet18": partial(DeepResNet, (2, 2, 2, 2)),
    "resnet34": partial(DeepResNet, (3, 4, 6, 3)),
    "resnet50": partial(DeepResNet, (3, 4, 6, 3), bottleneck=True),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "mobilenetv2": MobileNetV2,
}
"""Name -> function of the number of classes, and of further arguments, that returns a newly initialized network."""


def build_net(name: str, classes: int, **arguments: Any) -> nn.Module:
    """Build a newly initialized network.

    A network that returns more than its logits, under that name, returns them alone; one whose first convolution takes
    one channel gets the mean of three.

    Args:
        name: A key of NETS; "torchvision:NAME", "timm:NAME" or "hf:FOLDER" if that package is installed; or code of
            your own, which is run: "FILE.py:NAME" or "PACKAGE.MODULE:NAME". Arguments may follow, as in
            "resnet8(channels=1)".
        classes: Width of the output, at least 2.
        arguments: Further arguments of the network: plain values.

    Raises:
        UsageError: There is no such network, its package is not installed or does not work with the installed torch,
            its code does not build a network, or `classes` is below 2.
    """
    if classes < 2:
        raise UsageError(f"`classes` is {classes}; a classifier needs at least 2")
    spec = parse_spec(add_arguments(name, arguments))
    if spec.kind == "name":
        return adapt(_build_by_name(spec, classes))
    if spec.kind == "hf":
        return adapt(build_hugging_face_net(spec.member, classes, spec.arguments))
    if spec.runs_own_code:
        return adapt(build_own_net(spec, classes))
    return adapt(build_library_net(spec.kind, spec.member, classes, spec.arguments))


def _build_by_name(spec: NetSpec, classes: int) -> nn.Module:
    if spec.member not in NETS:
        raise unknown_name("no network is named", spec.member, [*NETS, *FORMS.replace(" or ", ", ").split(", ")])
    try:
        return NETS[spec.member](classes, **spec.arguments)
    except KdfastError:
        raise
    except Exception as error:  # any value may have been passed
        if not spec.arguments:
            raise
        remedy = f"omit what {spec.member} does not take" if isinstance(error, TypeError) else "change it"
        raise UsageError(f"`net_arg`: {spec} cannot be built ({first_line(error)}): {remedy}") from error
