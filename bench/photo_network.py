"""ResNet-18 with the stem for large images: a convolution of 7x7 at stride 2, then a pooling."""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """Two convolutions of 3x3 beside a shortcut, from `before` to `after` channels."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False),
            nn.BatchNorm2d(after),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        """Map `(B, before, H, W)` to `(B, after, H / stride, W / stride)`."""
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet18(nn.Module):
    """Four stages of two blocks, with `width` channels in the first and twice as many in each that follows."""

    def __init__(self, num_classes: int = 1000, width: int = 64) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        ]
        channels = width
        for stage in range(4):
            for block in range(2):
                after = width << stage
                layers.append(Block(channels, after, 2 if stage and not block else 1))
                channels = after
        self.stages = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images `(B, 3, H, W)` to logits `(B, num_classes)`."""
        logits: Tensor = self.fc(self.pool(self.stages(x)).flatten(1))
        return logits
