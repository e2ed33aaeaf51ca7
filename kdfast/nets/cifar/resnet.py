"""Residual networks for small images: three stages of n blocks, depth 6n + 2.

Layer names are those of RepDistiller (option B) and of the common CIFAR-10 reproduction of the paper (option A), so
that their weights load unchanged.

Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2, with widths 16, 32, 64. The
networks named x4 have four times these widths and a stem of 32 channels: Tian et al., "Contrastive Representation
Distillation", ICLR 2020.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.errors import UsageError

Shortcut = Literal["A", "B"]


def init_convolutions(net: nn.Module) -> None:
    """Initialize convolutions by Kaiming's fan-out rule and batch norms to the identity, in place."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)


def global_average(x: Tensor) -> Tensor:
    """Average over the spatial axes: (B, C, h, w) -> (B, C)."""
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


class SubsampleAndPad(nn.Module):
    """Parameter-free shortcut of option A: subsample the pixels, and pad the channels with zeros on both sides."""

    def __init__(self, extra_channels: int, stride: int) -> None:
        super().__init__()
        self.before = extra_channels // 2
        self.after = extra_channels - self.before
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C + extra, ceil(h / stride), ceil(w / stride))."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int, shortcut: Shortcut) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            if shortcut == "A":
                self.downsample = SubsampleAndPad(outputs - inputs, stride)
            else:
                projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))
        # A module, so that a hook can read what enters it: the block's activations before the ReLU.
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out = out + (x if self.downsample is None else self.downsample(x))
        return cast(Tensor, self.relu2(out))


class CifarResNet(nn.Module):
    """ResNet of depth 6n + 2 for images of about 32x32; other sizes work too, because the pooling adapts.

    Args:
        depth: 6n + 2, for example 20.
        classes: Width of the output.
        channels: Channels of the images.
        widths: Channels after the stem and in each stage.
        shortcut: "B": a 1x1 convolution with batch norm where the shape changes, and a classifier named ``fc``. "A":
            parameter-free, and a classifier named ``linear``.

    Raises:
        UsageError: The depth is not 6n + 2.
    """

    def __init__(
        self,
        depth: int,
        classes: int,
        shortcut: Shortcut = "B",
        *,
        channels: int = 3,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise UsageError(f"a CIFAR ResNet has depth 6n + 2 (8, 14, 20, ...); got {depth}")
        blocks = (depth - 2) // 6
        stem, first, second, third = widths
        self.conv1 = nn.Conv2d(channels, stem, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU()
        self.layer1 = self._stage(stem, first, 1, blocks, shortcut)
        self.layer2 = self._stage(first, second, 2, blocks, shortcut)
        self.layer3 = self._stage(second, third, 2, blocks, shortcut)
        self.head_name = "linear" if shortcut == "A" else "fc"
        self.add_module(self.head_name, nn.Linear(third, classes))
        init_convolutions(self)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int, shortcut: Shortcut) -> nn.Sequential:
        first = BasicBlock(inputs, outputs, stride, shortcut)
        return nn.Sequential(first, *(BasicBlock(outputs, outputs, 1, shortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, h, w) -> logits (B, classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        head = cast(nn.Linear, self.get_submodule(self.head_name))
        return cast(torch.Tensor, head(global_average(x)))
