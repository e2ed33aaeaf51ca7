"""A CIFAR data set in a few small files: lossless sheets of images, labels, and a teacher.

One folder holds a tenth of the training images, or another share, and the test split. A second one, which may come
later, holds the other training images, in sheets of at most `_LARGEST`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from kdfast.data.readers.archives.cifar import CIFAR10, CIFAR100

LAYOUTS = {layout.kind: layout for layout in (CIFAR10, CIFAR100)}
INFO, LABELS, TEACHER = "info.json", "labels.npz", "teacher.pt"
_COLUMNS = 100
_SIDE = 32
_LARGEST = 15_000  # images of a sheet of the second folder: 25 MiB of CIFAR
Images = NDArray[np.uint8]
LabeledImages = tuple[Images, NDArray[np.int64]]


def write_sheet(path: Path, images: Images) -> None:
    """Write images, uint8 (N, 32, 32, 3), as tiles of one WebP file, without loss."""
    rows = -(-len(images) // _COLUMNS)
    tiles = np.zeros((rows * _COLUMNS, _SIDE, _SIDE, 3), np.uint8)
    tiles[: len(images)] = images
    tiles = tiles.reshape(rows, _COLUMNS, _SIDE, _SIDE, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(tiles.reshape(rows * _SIDE, _COLUMNS * _SIDE, 3)).save(path, "WEBP", lossless=True, quality=50)


def read_sheet(path: Path, count: int) -> Images:
    """Return the images of `write_sheet`."""
    sheet = np.asarray(Image.open(path))
    tiles = sheet.reshape(-1, _SIDE, _COLUMNS, _SIDE, 3).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(-1, _SIDE, _SIDE, 3)[:count])


def digest(images: Images, labels: NDArray[np.int64]) -> str:
    """Return the SHA-256 of images and labels."""
    total = hashlib.sha256(np.ascontiguousarray(images).data)
    total.update(np.ascontiguousarray(labels, np.int64).data)
    return total.hexdigest()


def write_sheets(folder: Path, images: Images) -> None:
    """Write images as sheets that `read_sheets` joins."""
    for number, start in enumerate(range(0, len(images), _LARGEST)):
        write_sheet(folder / f"{number}.webp", images[start : start + _LARGEST])


def read_sheets(folder: Path, count: int) -> Images:
    """Return the images of `write_sheets`."""
    sizes = [min(_LARGEST, count - start) for start in range(0, count, _LARGEST)]
    return np.concatenate([read_sheet(folder / f"{number}.webp", size) for number, size in enumerate(sizes)])


def is_whole(folder: Path) -> bool:
    """Return whether the second folder has all of its files, which may arrive one after the other."""
    if not (folder / LABELS).exists():
        return False
    sheets = -(-len(np.load(folder / LABELS)["rest"]) // _LARGEST)
    return all((folder / f"{number}.webp").exists() for number in range(sheets))


def unpack(packed: Path, out: Path, rest: Path | None = None) -> None:
    """Write the official archive of packed data, after a check of every pixel.

    Args:
        packed: Folder of `gpu.pack_data`.
        out: Folder of the archive; it must have the official name.
        rest: Folder of the other training images; None: the archive holds the packed ones alone.
    """
    info: dict[str, Any] = json.loads((packed / INFO).read_text())
    labels = np.load(packed / LABELS)
    splits: dict[str, LabeledImages] = {}
    for name in ("train", "test"):
        splits[name] = (read_sheet(packed / f"{name}.webp", len(labels[name])), labels[name])
        _check(splits[name], info["sha256"][name], packed)
    if rest is not None:
        splits["train"] = _whole(labels["ids"], splits["train"], rest)
        _check(splits["train"], info["sha256"]["whole"], rest)
    write_archive(out, info["kind"], splits["train"], splits["test"], info["classes"])


def _whole(ids: NDArray[np.int64], kept: LabeledImages, rest: Path) -> LabeledImages:
    """Return the whole training split, in its order."""
    labels = np.load(rest / LABELS)
    images = np.concatenate([kept[0], read_sheets(rest, len(labels["rest"]))])
    order = np.argsort(np.concatenate([ids, labels["ids"]]))
    return images[order], np.concatenate([kept[1], labels["rest"]])[order]


def _check(split: LabeledImages, expected: str, folder: Path) -> None:
    if digest(*split) != expected:
        raise SystemExit(f"{folder} is damaged: pack the data again")


def write_archive(out: Path, kind: str, train: LabeledImages, test: LabeledImages, classes: list[str]) -> None:
    """Write images and labels in the official layout of `cifar10` or `cifar100`."""
    layout = LAYOUTS[kind]
    out.mkdir(parents=True, exist_ok=True)
    parts = np.array_split(np.arange(len(train[0])), len(layout.train))
    files = {name: (train[0][part], train[1][part]) for name, part in zip(layout.train, parts, strict=True)}
    for name, (images, labels) in {**files, layout.test: test}.items():
        rows = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
        content = {"data": rows, layout.labels: [int(label) for label in labels]}
        (out / name).write_bytes(pickle.dumps(content, protocol=2))
    (out / layout.meta).write_bytes(pickle.dumps({layout.names: list(classes)}, protocol=2))
