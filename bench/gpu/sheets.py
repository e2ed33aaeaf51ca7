"""A part of a CIFAR data set in a few small files: lossless sheets of images, labels, and a teacher."""

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
Images = NDArray[np.uint8]


def write_sheet(path: Path, images: Images) -> None:
    """Write images, uint8 (N, 32, 32, 3), as tiles of one PNG file."""
    rows = -(-len(images) // _COLUMNS)
    tiles = np.zeros((rows * _COLUMNS, _SIDE, _SIDE, 3), np.uint8)
    tiles[: len(images)] = images
    tiles = tiles.reshape(rows, _COLUMNS, _SIDE, _SIDE, 3).transpose(0, 2, 1, 3, 4)
    Image.fromarray(tiles.reshape(rows * _SIDE, _COLUMNS * _SIDE, 3)).save(path, compress_level=9)


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


def unpack(packed: Path, out: Path) -> dict[str, Any]:
    """Write the official archive of packed data, check every pixel, and return its info.json.

    Args:
        packed: Folder of `gpu.pack_data`.
        out: Folder of the archive; it must have the official name.
    """
    info: dict[str, Any] = json.loads((packed / INFO).read_text())
    labels = np.load(packed / LABELS)
    splits = {}
    for name in ("train", "test"):
        images = read_sheet(packed / f"{name}.png", len(labels[name]))
        if digest(images, labels[name]) != info["sha256"][name]:
            raise SystemExit(f"{packed} is damaged: pack the data again")
        splits[name] = (images, labels[name])
    write_archive(out, info["kind"], splits["train"], splits["test"], info["classes"])
    return info


def write_archive(
    out: Path, kind: str, train: tuple[Images, Any], test: tuple[Images, Any], classes: list[str]
) -> None:
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
