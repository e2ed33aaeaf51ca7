"""Make a folder of JPEG images of mixed sizes from CIFAR-10 and CIFAR-100, to try data of ImageNet's shape.

    python bench/make_photo_folder.py --cifar10 cifar-10-batches-py --cifar100 cifar-100-python --out photos

The 110 classes are the 100 of CIFAR-100 and the 10 of CIFAR-10. Each image is cut to an aspect ratio drawn between 3:4
and 4:3, enlarged by Lanczos so that its shorter side has 160 to 256 pixels, and saved as JPEG, quality 70 to 95,
with 4:2:0 or 4:4:4 chroma; one in fifty is gray. All is drawn from the seed. `--per-class` images of each class are for
training (twice as many of CIFAR-10's), and a tenth as many for testing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from kdfast.data.readers.registry import open_source
from kdfast.data.source import Split


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--cifar100", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-class", type=int, default=180)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    random = np.random.default_rng(args.seed)
    total = 0
    for path, count in ((args.cifar100, args.per_class), (args.cifar10, 2 * args.per_class)):
        source = open_source(path)
        total += write_split(source.train, source.classes, args.out / "train", path.name, count, random)
        total += write_split(source.test, source.classes, args.out / "test", path.name, count // 10, random)
    print(f"{total} images in {args.out}")


def write_split(
    split: Split, classes: tuple[str, ...], out: Path, prefix: str, count: int, random: np.random.Generator
) -> int:
    """Write `count` images of each class; return the number written."""
    labels = np.asarray(split.labels)
    for label, name in enumerate(classes):
        folder = out / f"{prefix}-{name}"
        folder.mkdir(parents=True, exist_ok=True)
        ids = random.permutation(np.flatnonzero(labels == label))[:count]
        for index, pixels in zip(ids, np.asarray(split.read(ids)), strict=True):
            write_photo(pixels, folder / f"{index:05d}.jpg", random)
    return len(classes) * count


def write_photo(pixels: np.ndarray, path: Path, random: np.random.Generator) -> None:
    """Cut, enlarge and save one image `(32, 32, 3)` uint8."""
    side = len(pixels)
    aspect = float(np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3))))
    wide, tall = (side, round(side / aspect)) if aspect > 1 else (round(side * aspect), side)
    left, top = random.integers(0, side - wide + 1), random.integers(0, side - tall + 1)
    short = int(random.integers(160, 257))
    size = (round(short * max(1.0, wide / tall)), round(short * max(1.0, tall / wide)))
    photo = Image.fromarray(pixels[top : top + tall, left : left + wide]).resize(size, Image.Resampling.LANCZOS)
    if random.random() < 0.02:
        photo = photo.convert("L")
    photo.save(path, quality=int(random.integers(70, 96)), subsampling=int(random.choice([0, 2])))


if __name__ == "__main__":
    main()
