"""Small data sets of every kind, written to temporary folders."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kdfast.data.source import ArraySplit


def make_split(count=60, side=8, classes=3, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return ArraySplit(images, np.arange(count) % classes, f"split {seed}")


def write_cifar(root, kind, protocol=2, per_batch=20):
    rng = np.random.default_rng(1)
    fine, folder, train, test, meta, names = {
        "cifar10": (
            "labels",
            "cifar-10-batches-py",
            [f"data_batch_{i}" for i in range(1, 6)],
            "test_batch",
            "batches.meta",
            "label_names",
        ),
        "cifar100": ("fine_labels", "cifar-100-python", ["train"], "test", "meta", "fine_label_names"),
    }[kind]
    classes = 10 if kind == "cifar10" else 100
    (root / folder).mkdir(parents=True)
    for name in (*train, test):
        data = rng.integers(0, 256, (per_batch, 3072), dtype=np.uint8)
        labels = [int(i) % classes for i in range(per_batch)]
        (root / folder / name).write_bytes(pickle.dumps({b"data": data, fine.encode(): labels}, protocol))
    content = {names: [f"class {i}" for i in range(classes)]}
    (root / folder / meta).write_bytes(pickle.dumps(content, protocol))
    return root / folder


def write_svhn(root, count=20):
    from scipy.io import savemat

    root.mkdir()
    rng = np.random.default_rng(2)
    for name in ("train_32x32.mat", "test_32x32.mat"):
        images = rng.integers(0, 256, (32, 32, 3, count), dtype=np.uint8)
        labels = (np.arange(count) % 10 + 1).astype(np.uint8)[:, None]
        savemat(root / name, {"X": images, "y": labels})
    return root


def write_folder(root, side=16, classes=("ant", "bee"), per_class=4, test="test", sizes=None):
    rng = np.random.default_rng(3)
    for part in ("train", test):
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for index in range(per_class):
                height, width = sizes[index % len(sizes)] if sizes else (side, side)
                pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index}.png")
    return root


def write_npz(path, **changes):
    rng = np.random.default_rng(4)
    arrays = {
        "train_images": rng.integers(0, 256, (12, 16, 16, 3), dtype=np.uint8),
        "train_labels": np.arange(12) % 3,
        "test_images": rng.integers(0, 256, (6, 16, 16, 3), dtype=np.uint8),
        "test_labels": np.arange(6) % 3,
    }
    arrays.update(changes)
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def write_relabelled(root):
    from kdfast.data.readers.registry import open_source
    from kdfast.data.readers.relabel import write_flipped

    data = write_npz(root / "base.npz")
    write_flipped(open_source(data), str(data), root / "relabelled", share=0.25, seed=0)
    return root / "relabelled"


def write_betons(root):
    from kdfast.data.ffcv.write import convert
    from kdfast.data.source import Source, default_view_spec

    train, test = make_split(30), make_split(9, seed=1)
    convert(Source("memory", "npz", ("a", "b", "c"), train, test, default_view_spec(train.shape, flip=False)), root)
    return root


@pytest.fixture
def split() -> Callable[..., ArraySplit]:
    return make_split


@pytest.fixture
def cifar() -> Callable[..., Path]:
    return write_cifar


@pytest.fixture
def svhn() -> Callable[..., Path]:
    return write_svhn


@pytest.fixture
def image_folder() -> Callable[..., Path]:
    return write_folder


@pytest.fixture
def npz() -> Callable[..., Path]:
    return write_npz


@pytest.fixture
def make_source(tmp_path) -> Callable[[str], Path | str]:
    """Write a small source of a kind: kind -> path."""

    def build(kind):
        if kind == "digits":
            return "digits"
        if kind == "beton":
            pytest.importorskip("ffcv")
            return write_betons(tmp_path / "betons")
        return {
            "cifar10": lambda: write_cifar(tmp_path, "cifar10"),
            "cifar100": lambda: write_cifar(tmp_path, "cifar100"),
            "svhn": lambda: write_svhn(tmp_path / "svhn"),
            "folder": lambda: write_folder(tmp_path / "images"),
            "npz": lambda: write_npz(tmp_path / "data.npz"),
            "relabelled": lambda: write_relabelled(tmp_path),
        }[kind]()

    return build
