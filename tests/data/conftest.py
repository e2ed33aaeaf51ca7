"""Small data sets of every kind, written to temporary folders."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import shutil
import tarfile
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


def write_classes(root, **options):
    write_folder(root, **options)
    shutil.rmtree(root / "test")
    for folder in (root / "train").iterdir():
        folder.rename(root / folder.name)
    (root / "train").rmdir()
    return root


def write_lists(root):
    write_folder(root)
    for part in ("train", "test"):
        files = [f"{name}/{index}.png" for name in ("bee", "ant") for index in range(4)]
        (root / f"{part}.txt").write_text("".join(f"{file} {file[:3]}\n" for file in files))
    (root / "train").rename(root / "images")
    shutil.copytree(root / "test", root / "images", dirs_exist_ok=True)
    shutil.rmtree(root / "test")
    return root


def idx_bytes(array):
    array = np.asarray(array, np.uint8)
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def write_idx(root, classes=10, packed=("t10k",)):
    rng = np.random.default_rng(5)
    root.mkdir(parents=True)
    for part, count in (("train", 30), ("t10k", 10)):
        arrays = {"images-idx3": rng.integers(0, 256, (count, 28, 28)), "labels-idx1": np.arange(count) % classes}
        for what, array in arrays.items():
            content = idx_bytes(array)
            if part in packed:
                (root / f"{part}-{what}-ubyte.gz").write_bytes(gzip.compress(content))
            else:
                (root / f"{part}-{what}-ubyte").write_bytes(content)
    return root


def write_stl10(root):
    rng = np.random.default_rng(6)
    root.mkdir()
    for part, count in (("train", 20), ("test", 10)):
        (root / f"{part}_X.bin").write_bytes(rng.integers(0, 256, (count, 3, 96, 96), dtype=np.uint8).tobytes())
        (root / f"{part}_y.bin").write_bytes((np.arange(count) % 10 + 1).astype(np.uint8).tobytes())
    return root


def encode_image(pixels, form="PNG"):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format=form)
    return stream.getvalue()


def write_tar(path, members):
    """Write a .tar of (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def write_shards(root, labels=("0", "1", "2")):
    rng = np.random.default_rng(7)
    for part, shards in (("train", 2), ("test", 1)):
        for shard in range(shards):
            members = []
            for index in range(6):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                members += [
                    (f"{index:04}.png", encode_image(pixels)),
                    (f"{index:04}.cls", labels[index % len(labels)].encode()),
                ]
            write_tar(root / f"{part}-{shard:06}.tar", members)
    return root


def write_table(root, names=("ant", "bee"), rows=8, features=True, splits=("train", "test"), **columns):
    """Write Parquet files as the hub of Hugging Face has them."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rng = np.random.default_rng(8)
    folder = root / "data"
    folder.mkdir(parents=True)
    for part in splits:
        images = [
            {"bytes": encode_image(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)), "path": None}
            for _ in range(rows)
        ]
        table = pyarrow.table({"image": images, "label": [row % len(names) for row in range(rows)], **columns})
        if features:
            kinds = {"image": {"_type": "Image"}, "label": {"names": list(names), "_type": "ClassLabel"}}
            recorded = json.dumps({"info": {"features": kinds}})
            table = table.replace_schema_metadata({"huggingface": recorded})
        parquet.write_table(table, folder / f"{part}-00000-of-00001.parquet")
    return root


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


@pytest.fixture(scope="session")
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
def write():
    """Return the writers of small sources by kind: function of a path."""
    return {
        "folder": write_folder,
        "classes": write_classes,
        "list": write_lists,
        "idx": write_idx,
        "stl10": write_stl10,
        "shards": write_shards,
        "table": write_table,
        "npz": write_npz,
        "tar": write_tar,
    }


@pytest.fixture
def encode():
    """Return the function that encodes uint8 pixels as a file."""
    return encode_image


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
            "classes": lambda: write_classes(tmp_path / "classes"),
            "list": lambda: write_lists(tmp_path / "lists"),
            "idx": lambda: write_idx(tmp_path / "mnist"),
            "stl10": lambda: write_stl10(tmp_path / "stl10_binary"),
            "shards": lambda: write_shards(tmp_path / "shards"),
            "table": lambda: write_table(tmp_path / "table"),
        }[kind]()

    return build
