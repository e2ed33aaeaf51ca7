"""Images and labels in an .npz file, as kdfast, Keras or MedMNIST name the arrays."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.data.readers.split import SplitRule, train_and_test
from kdfast.data.source import ArraySplit, Source, default_view_spec, infer_class_names
from kdfast.errors import DataError
from kdfast.files.arrays import read_npz
from kdfast.files.inputs import open_regular

_ADVICE = "write it again with np.savez"
# Names of images and labels; Keras's mnist.npz has the second pair.
_NAMINGS = (("{}_images", "{}_labels"), ("x_{}", "y_{}"))
_SINGLE = ("images", "labels")
_TESTS = ("test", "val")


def is_npz(path: Path) -> bool:
    """Return whether `path` is a file whose name ends in .npz."""
    return path.is_file() and path.suffix == ".npz"


def open_npz(path: Path, split: SplitRule | None = None) -> Source:
    """Read `train_images`, `train_labels`, `test_images` and `test_labels` from an .npz file.

    Other names are `x_train`, `y_train`, ...; `val` instead of `test` where there is no `test`; or `images` and
    `labels` with a rule for the test split. Images are uint8 `(N, H, W, 3)` or gray `(N, H, W)`; labels are integers
    `(N,)` or `(N, 1)`, 0 to C - 1 without a gap. The classes are named `0`, `1`, ... Views below 64 pixels do not flip,
    because a mirrored image may be of another class.

    Args:
        path: The file.
        split: How to take the test split from the training images, where there is none.

    Raises:
        DataError: An array is missing, damaged, or of another dtype or shape.
        UsageError: `split` is given, and there is a test split.
    """
    train_keys, test_keys, unused = _choose(path)
    arrays = read_npz(path, (*train_keys, *(test_keys or ())), advice=_ADVICE)
    train = _split(arrays, train_keys, path)
    test = None if test_keys is None else _split(arrays, test_keys, path)
    classes = infer_class_names(train.labels, str(path))
    looked_for = "test_images, val_images, x_test, x_val"
    first, second, notes = train_and_test(train, test, split, str(path), looked_for)
    if unused:
        notes += (f"{path}: {unused} is not used; the test images are {test_keys[0] if test_keys else 'others'}",)
    views = default_view_spec(train.shape, flip=False)
    return Source(str(path), "npz", classes, first, second, views, notes=notes)


def _choose(path: Path) -> tuple[tuple[str, str], tuple[str, str] | None, str | None]:
    """Return the names of the training arrays and of the test arrays, and of images that are not used."""
    held = _names(path)
    for images, labels in _NAMINGS:
        pairs = {part: (images.format(part), labels.format(part)) for part in ("train", *_TESTS)}
        if any(key in held for key in pairs["train"]):
            found = [part for part in _TESTS if any(key in held for key in pairs[part])]
            unused = pairs["val"][0] if found == list(_TESTS) else None
            return pairs["train"], pairs[found[0]] if found else None, unused
    if all(key in held for key in _SINGLE):
        return _SINGLE, None, None
    first = tuple(name.format(part) for part in ("train", "test") for name in _NAMINGS[0])
    read_npz(path, first, advice=_ADVICE)  # says what is missing
    raise DataError(f"{path} lacks {', '.join(first)}: {_ADVICE}")


def _names(path: Path) -> set[str]:
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except Exception:  # a damaged archive can fail in any part of the reader; reading it says how
        return set()


def _split(arrays: dict[str, np.ndarray[Any, Any]], keys: tuple[str, str], path: Path) -> ArraySplit:
    labels = arrays[keys[1]]
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim == 2 and len(labels) == len(arrays[keys[0]]):
        raise DataError(
            f"{keys[1]} of {path} has {labels.shape[1]} labels per image: pass data with one class per image"
        )
    return ArraySplit(arrays[keys[0]], labels, f"{keys[0]} of {path}")
