"""MobileNetV2 for small images: half the published width, and a stem that halves the image once.

The pooling adapts to the size of the images. Layer names are those of RepDistiller, so that its weights load unchanged.

Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", CVPR 2018, table 2; strides and width
as in Tian et al., "Contrastive Representation Distillation", ICLR 2020.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from kdfast.nets.cifar.resnet import global_average, init_convolutions

# Expansion, width at factor 1, blocks, and stride of the first block, for each stage.
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
_STEM, _LAST = 32, 1280  # channels at factor 1; the last are not reduced with it


class InvertedResidual(nn.Module):
    """A 1x1 convolution that widens, a depthwise 3x3 convolution, and a linear 1x1 convolution that narrows."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, wide, 3, stride, padding=1, groups=wide, bias=False),
            nn.BatchNorm2d(wide),
            nn.ReLU(),
            nn.Conv2d(wide, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.keeps_shape = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        out = cast(Tensor, self.conv(x))
        return x + out if self.keeps_shape else out


class MobileNetV2(nn.Module):
    """MobileNetV2 for images of about 32x32.

    Args:
        classes: Width of the output.
        width: Factor of the widths.
        channels: Channels of the images.
    """

    def __init__(self, classes: int, *, width: float = 0.5, channels: int = 3) -> None:
        super().__init__()
        inputs = int(_STEM * width)
        self.conv1 = nn.Sequential(
            nn.Conv2d(channels, inputs, 3, 2, padding=1, bias=False), nn.BatchNorm2d(inputs), nn.ReLU()
        )
        stages = []
        for expansion, base, count, stride in _STAGES:
            outputs = int(base * width)
            blocks = [InvertedResidual(inputs, outputs, stride, expansion)]
            blocks += [InvertedResidual(outputs, outputs, 1, expansion) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
            inputs = outputs
        self.blocks = nn.ModuleList(stages)
        last = int(_LAST * max(width, 1.0))
        self.conv2 = nn.Sequential(nn.Conv2d(inputs, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU())
        self.classifier = nn.Sequential(nn.Linear(last, classes))
        init_convolutions(self)
        head = cast(nn.Linear, self.classifier[0])
        nn.init.normal_(head.weight, std=0.01)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, channels, h, w) -> logits (B, classes)."""
        x = self.conv1(x)
        for stage in self.blocks:
            x = stage(x)
        return cast(Tensor, self.classifier(global_average(self.conv2(x))))
