"""Wide residual networks: pre-activation blocks, three stages, depth 6n + 4, widths 16k, 32k, 64k.

Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016. Layer names are RepDistiller's.
"""

from __future__ import annotations

from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from kdfast.errors import UsageError
from kdfast.nets.cifar.resnet import global_average, init_convolutions


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch norm and ReLU; a 1x1 convolution as shortcut if the width changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        # A block that keeps its width also keeps its size, so its shortcut is the identity.
        self.convShortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        active = F.relu(self.bn1(x))
        out = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return cast(Tensor, out + (x if self.convShortcut is None else self.convShortcut(active)))


class Stage(nn.Module):
    """Blocks of equal width; the first may reduce the image."""

    def __init__(self, inputs: int, outputs: int, stride: int, blocks: int) -> None:
        super().__init__()
        first = PreActivationBlock(inputs, outputs, stride)
        self.layer = nn.Sequential(first, *(PreActivationBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        return cast(Tensor, self.layer(x))


class WideResNet(nn.Module):
    """Wide ResNet WRN-depth-widen, for example WRN-40-2 with ``depth=40, widen=2``.

    Args:
        depth: 6n + 4.
        widen: Factor k of the stage widths 16, 32, 64; at least 2.
        classes: Width of the output.
        channels: Channels of the images.

    Raises:
        UsageError: The depth is not 6n + 4, or widen is below 2.
    """

    def __init__(self, depth: int, widen: int, classes: int, *, channels: int = 3) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6:
            raise UsageError(f"a wide ResNet has depth 6n + 4 (10, 16, 22, 28, 34, 40, ...); got {depth}")
        if widen < 2:
            raise UsageError(f"a wide ResNet needs a widening factor of at least 2; got {widen}")
        blocks = (depth - 4) // 6
        self.conv1 = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        self.block1 = Stage(16, 16 * widen, 1, blocks)
        self.block2 = Stage(16 * widen, 32 * widen, 2, blocks)
        self.block3 = Stage(32 * widen, 64 * widen, 2, blocks)
        self.bn1 = nn.BatchNorm2d(64 * widen)
        self.fc = nn.Linear(64 * widen, classes)
        init_convolutions(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, h, w) -> logits (B, classes)."""
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return cast(Tensor, self.fc(global_average(F.relu(self.bn1(x)))))
