"""Distillation as it is commonly written: a DataLoader of PIL images, the teacher in every step, and an eager loss.

    python bench/plain_loop.py --data cifar-100-python --teacher T.pt [--student resnet32] [--batch 64] [--epochs 3]

Follows the loop of RepDistiller (Tian et al., Contrastive Representation Distillation, ICLR 2020) with plain PyTorch:
random crops with padding and flips in worker processes, float32, SGD with momentum. Prints the images per second of the
epochs after the first one.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source, compute_normalization
from kdfast.nets import build_net
from kdfast.nets.checkpoint import load_model

TEMPERATURE, ALPHA = 4.0, 0.9
_PAD = 4


class Images(Dataset[tuple[Tensor, int]]):
    """Training images as PIL images, padded, cropped, flipped and normalized one at a time."""

    def __init__(self, source: Source) -> None:
        self.images = source.train.read(np.arange(len(source.train)))
        self.labels = source.train.labels
        norm = compute_normalization(source.train)
        self.mean, self.std = (torch.tensor(value).view(3, 1, 1) for value in (norm.mean, norm.std))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = ImageOps.expand(Image.fromarray(self.images[index]), _PAD)
        left, top = random.randrange(2 * _PAD + 1), random.randrange(2 * _PAD + 1)
        side = self.images.shape[1]
        image = image.crop((left, top, left + side, top + side))
        if random.random() < 0.5:
            image = ImageOps.mirror(image)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div_(255)
        return (pixels - self.mean) / self.std, int(self.labels[index])


def train_epoch(
    student: torch.nn.Module, teacher: torch.nn.Module, loader: DataLoader[tuple[Tensor, int]], device: str
) -> None:
    """Train for one epoch."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
    for images, labels in loader:
        x, y = images.to(device), labels.to(device)
        z = student(x)
        with torch.no_grad():
            t = teacher(x)
        kl = F.kl_div(F.log_softmax(z / TEMPERATURE, 1), F.softmax(t / TEMPERATURE, 1), reduction="batchmean")
        loss = (1 - ALPHA) * F.cross_entropy(z, y) + ALPHA * TEMPERATURE**2 * kl
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def images_per_second(
    data: str, teacher_path: str, student: str, batch: int, epochs: int, device: str, workers: int
) -> list[float]:
    """Return the rate of each epoch after the first one."""
    source, model = open_source(data), load_model(teacher_path)
    net, teacher = build_net(student, len(source.classes)).to(device).train(), model.net.to(device).eval()
    loader = DataLoader(Images(source), batch, shuffle=True, num_workers=workers)
    rates = []
    for _ in range(epochs + 1):
        started = time.perf_counter()
        train_epoch(net, teacher, loader, device)
        if device == "cuda":
            torch.cuda.synchronize()
        rates.append(len(source.train) / (time.perf_counter() - started))
    return rates[1:]


def main() -> None:
    """Print the median rate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--student", default="resnet32")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    options = parser.parse_args()
    rates = images_per_second(
        options.data, options.teacher, options.student, options.batch, options.epochs, options.device, options.workers
    )
    print(f"{statistics.median(rates):.0f} images/s, {rates}")


if __name__ == "__main__":
    main()
