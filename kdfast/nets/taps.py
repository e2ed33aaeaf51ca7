"""Activations inside a network: where to read them, and hooks that do so during a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from kdfast.errors import UsageError, unknown_name
from kdfast.nets.cifar.deep_resnet import DeepResNet
from kdfast.nets.cifar.mobilenetv2 import MobileNetV2
from kdfast.nets.cifar.resnet import CifarResNet
from kdfast.nets.cifar.vgg import VGG
from kdfast.nets.cifar.wrn import WideResNet
from kdfast.nets.head import find_classifier

STAGES = ("stage1", "stage2", "stage3")
PREACTIVATIONS = ("preactivation1", "preactivation2", "preactivation3")
TAPS = ("stem", *STAGES, *PREACTIVATIONS, "pooled")
# Suffix of a place that is the input of a module; without it, the place is the module's output.
INPUT = "@input"


def default_places(net: nn.Module) -> dict[str, str]:
    """Return the places of the taps in a network of this package; of others, only "pooled" is known.

    Args:
        net: The network.

    Returns:
        A place for each tap's name: a module's name, for its output, or the name and `@input`, for its input. The
        stages are those of RepDistiller: after the ReLU in a ResNet or VGG, before it in a wide ResNet; of a network
        with more than three, the last three. MobileNetV2 has no ReLU there, so that its preactivations are its stages.
    """
    classifier = find_classifier(net)
    head = next(name for name, module in net.named_modules() if module is classifier)
    places = {"pooled": head + INPUT}
    if isinstance(net, CifarResNet):
        layers = ("layer1", "layer2", "layer3")
        last = [f"{layer}.{len(net.get_submodule(layer)) - 1}.relu2{INPUT}" for layer in layers]  # type: ignore[arg-type]
        return {"stem": "relu", **dict(zip(STAGES + PREACTIVATIONS, (*layers, *last), strict=True)), **places}
    if isinstance(net, WideResNet):
        blocks = ("block1", "block2", "block3")
        norms = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")
        return {"stem": "conv1", **dict(zip(STAGES + PREACTIVATIONS, (*blocks, *norms), strict=True)), **places}
    if isinstance(net, DeepResNet):
        layers = ("layer2", "layer3", "layer4")
        last = [f"{layer}.{len(net.get_submodule(layer)) - 1}.last_relu{INPUT}" for layer in layers]  # type: ignore[arg-type]
        return {"stem": "relu", **dict(zip(STAGES + PREACTIVATIONS, (*layers, *last), strict=True)), **places}
    if isinstance(net, VGG):
        after = ("relu2", "relu3", "relu4", "block2", "block3", "block4")
        return {"stem": "relu0", **dict(zip(STAGES + PREACTIVATIONS, after, strict=True)), **places}
    if isinstance(net, MobileNetV2):
        blocks = ("blocks.2", "blocks.4", "blocks.6")
        return {"stem": "conv1", **dict(zip(STAGES + PREACTIVATIONS, blocks * 2, strict=True)), **places}
    return places


class TapRecorder:
    """Records activations during each forward pass of a network.

        with TapRecorder(net, {"stage2": "layer2"}) as recorder:
            logits = net(images)
        recorder.take()["stage2"]

    Args:
        net: The network.
        places: A place for each name, see `default_places`.

    Raises:
        UsageError: The network has no such module; the nearest name is suggested.
    """

    def __init__(self, net: nn.Module, places: Mapping[str, str]) -> None:
        modules = dict(net.named_modules())
        self._taken: dict[str, tuple[Tensor, int]] = {}
        self._hooks: list[tuple[nn.Module, str, bool]] = []
        for name, place in places.items():
            module = place.removesuffix(INPUT)
            if not module or module not in modules:
                raise unknown_name(
                    f"`tap`: {type(net).__name__} has no module named", module, [m for m in modules if m]
                )
            self._hooks.append((modules[module], name, place.endswith(INPUT)))
        self._open: ExitStack | None = None

    def __enter__(self) -> TapRecorder:
        """Start to record."""
        self._open = ExitStack()
        for module, name, before in self._hooks:
            handle = (
                module.register_forward_pre_hook(self._before(name))
                if before
                else module.register_forward_hook(self._after(name))
            )
            self._open.enter_context(_removed(handle))
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the hooks."""
        if self._open is not None:
            self._open.close()
            self._open = None

    def take(self) -> dict[str, Tensor]:
        """Return the activations of the last forward pass by name, and forget them.

        Raises:
            UsageError: The network has changed one in place since it was read, as ReLU(inplace=True) does.
        """
        taken, self._taken = self._taken, {}
        for name, (activation, version) in taken.items():
            if activation._version != version:
                raise UsageError(
                    f"`tap`: the network changes {name!r} in place after it is read, as ReLU(inplace=True) does: "
                    "choose another place, or change the network"
                )
        return {name: activation for name, (activation, _) in taken.items()}

    def _before(self, name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._taken[name] = _versioned(name, inputs[0])

        return hook

    def _after(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: tuple[Any, ...], output: Any) -> None:
            self._taken[name] = _versioned(name, output)

        return hook


def _removed(handle: torch.utils.hooks.RemovableHandle) -> AbstractContextManager[Any]:
    return handle


def _versioned(name: str, value: Any) -> tuple[Tensor, int]:
    """Return an activation, and the number of changes in place that it has seen."""
    if not isinstance(value, Tensor):
        raise UsageError(f"`tap`: {name!r} is a {type(value).__name__}, not a tensor: choose another module")
    return value, value._version
