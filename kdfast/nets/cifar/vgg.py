"""VGG networks with batch norm for small images: five stages of 3x3 convolutions, and one linear layer.

The two hidden linear layers of the networks for ImageNet are left out, and images below 64 pixels are not reduced
after the fourth stage. Layer names are those of RepDistiller, so that its weights load unchanged.

Source: Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch.nn.functional as F
from torch import Tensor, fx, nn

from kdfast.nets.cifar.resnet import global_average

_WIDTHS = (64, 128, 256, 512, 512)
_LARGE = 8  # height after the fourth stage from which it is reduced: that of images of 64 pixels


class VGG(nn.Module):
    """VGG network with batch norm for images of 8 pixels and more.

    Args:
        depths: Convolutions of each of the five stages.
        classes: Width of the output.
        channels: Channels of the images.
    """

    def __init__(self, depths: Sequence[int], classes: int, *, channels: int = 3) -> None:
        super().__init__()
        inputs = channels
        for stage, (depth, width) in enumerate(zip(depths, _WIDTHS, strict=True)):
            self.add_module(f"block{stage}", _stage(inputs, width, depth))
            # A module, so that a hook can read the stage before and after its ReLU.
            self.add_module(f"relu{stage}", nn.ReLU())
            inputs = width
        self.classifier = nn.Linear(inputs, classes)
        _initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, h, w) -> logits (B, classes)."""
        for stage in range(len(_WIDTHS)):
            x = self.get_submodule(f"relu{stage}")(self.get_submodule(f"block{stage}")(x))
            if stage < 3:
                x = F.max_pool2d(x, 2)
            elif stage == 3:
                x = _reduce_large(x)
        return cast(Tensor, self.classifier(global_average(x)))


@fx.wrap  # its condition depends on the image, which a traced network could not follow
def _reduce_large(x: Tensor) -> Tensor:
    return F.max_pool2d(x, 2) if x.shape[2] >= _LARGE else x


def _stage(inputs: int, width: int, depth: int) -> nn.Sequential:
    """Return convolutions with batch norm, and ReLUs between them."""
    layers: list[nn.Module] = []
    for position in range(depth):
        layers += [nn.Conv2d(inputs if position == 0 else width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _initialize(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(cast(Tensor, module.bias))
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)
