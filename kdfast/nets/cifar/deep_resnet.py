"""Residual networks of four stages with a stem for small images: ResNet-18, 34 and 50.

A 3x3 convolution without stride takes the place of the 7x7 convolution and the pooling of the networks for ImageNet.
Layer names are those of RepDistiller, so that its weights load unchanged.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, table 1.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.nets.cifar.resnet import global_average, init_convolutions

_WIDTHS = (64, 128, 256, 512)


class _Block(nn.Module):
    """Convolutions with batch norm, and a shortcut with a 1x1 convolution where the shape changes."""

    def _add_shortcut(self, inputs: int, outputs: int, stride: int) -> None:
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        # A module, so that a hook can read what enters it: the block's activations before the ReLU.
        self.last_relu = nn.ReLU()


class BasicBlock(_Block):
    """Two 3x3 convolutions."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self._add_shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, width, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        return cast(Tensor, self.last_relu(self.bn2(self.conv2(out)) + self.shortcut(x)))


class Bottleneck(_Block):
    """A 1x1 convolution, a 3x3 convolution that may have a stride, and a 1x1 convolution to four times the width."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self._add_shortcut(inputs, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, 4 * width, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return cast(Tensor, self.last_relu(self.bn3(self.conv3(out)) + self.shortcut(x)))


class DeepResNet(nn.Module):
    """ResNet of four stages for images of about 32x32; other sizes work too, because the pooling adapts.

    Args:
        blocks: Blocks of each stage.
        classes: Width of the output.
        bottleneck: Whether the blocks are bottlenecks.
        channels: Channels of the images.
    """

    def __init__(
        self, blocks: tuple[int, int, int, int], classes: int, *, bottleneck: bool = False, channels: int = 3
    ) -> None:
        super().__init__()
        block: type[BasicBlock] | type[Bottleneck] = Bottleneck if bottleneck else BasicBlock
        factor = 4 if bottleneck else 1
        self.conv1 = nn.Conv2d(channels, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.relu = nn.ReLU()
        inputs, stages = _WIDTHS[0], []
        for position, (count, width) in enumerate(zip(blocks, _WIDTHS, strict=True)):
            layers = [block(inputs, width, 1 if position == 0 else 2)]
            layers += [block(factor * width, width, 1) for _ in range(count - 1)]
            stages.append(nn.Sequential(*layers))
            inputs = factor * width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.linear = nn.Linear(inputs, classes)
        init_convolutions(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, h, w) -> logits (B, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return cast(Tensor, self.linear(global_average(x)))
