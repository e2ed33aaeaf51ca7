"""Record training dynamics for the memorization score, on flipped labels, with a small network that memorizes them.

    python bench/record_memorization.py --data noisy10 --out mem [--runs 6] [--keep 0.67] [--only RUN]

A network that never fits wrong labels cannot show memorization, so the score needs one that ends near 100% accuracy on
its own training samples: four convolutions and a wide hidden layer (1.4 million weights, half of resnet8's time), no
augmentation, no weight decay. Run the same command again to continue; several processes may each record one run
(--only). bench_planted.py makes the table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

from kdfast.data.loaders import make_loader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.distillation.config import RunConfig
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.record_dynamics import RecordingConfig, record_dynamics
from kdfast.distillation.targets import TeacherTargets
from kdfast.nets import NETS


def small_vgg(classes: int) -> nn.Module:
    """Build four 3x3 convolutions for 32x32 images, a hidden layer of 256, and the classifier."""

    def block(width_in: int, width: int, stride: int = 1) -> list[nn.Module]:
        convolution = nn.Conv2d(width_in, width, 3, padding=1, stride=stride, bias=False)
        return [convolution, nn.BatchNorm2d(width), nn.ReLU(inplace=True)]

    hidden = [nn.Linear(4096, 256, bias=False), nn.BatchNorm1d(256), nn.ReLU(inplace=True)]
    return nn.Sequential(
        *block(3, 32, 2),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.MaxPool2d(2),
        *block(128, 256),
        nn.Flatten(),
        *hidden,
        nn.Linear(256, classes),
    )


def main() -> None:
    """Record the runs and print their accuracies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=6)
    parser.add_argument("--keep", type=float, default=0.67)
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--record-every", type=int, default=7)
    parser.add_argument("--only", type=int)
    arguments = parser.parse_args()
    NETS["vgg_small"] = small_vgg
    torch.set_num_threads(1)  # several processes record at the same time
    source = open_source(arguments.data)
    inputs = LoadedInputs(source, make_loader(source.train), compute_normalization(source.train), TeacherTargets())
    config = RunConfig(
        student="vgg_small",
        epochs=arguments.epochs,
        batch_size=128,
        lr=0.1,
        weight_decay=0.0,
        schedule="cosine",
        precision="bf16",
        views=1,
    )
    recording = RecordingConfig(
        runs=arguments.runs, only=arguments.only, keep=arguments.keep, record_every=arguments.record_every
    )
    for result in record_dynamics(inputs, config, recording, arguments.out, device=torch.device("cpu")):
        print(f"test top-1 {result['test_top1']:.2f} after {result['seconds']:.0f} s of training")


if __name__ == "__main__":
    main()
