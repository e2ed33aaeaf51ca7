"""Images and labels in an .npz file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from kdfast.data.source import ArraySplit, Source, default_view_spec, infer_class_names
from kdfast.files.arrays import read_npz

_KEYS = ("train_images", "train_labels", "test_images", "test_labels")


def is_npz(path: Path) -> bool:
    """Return whether `path` is a file whose name ends in .npz."""
    return path.is_file() and path.suffix == ".npz"


def open_npz(path: Path) -> Source:
    """Read `train_images`, `train_labels`, `test_images` and `test_labels` from an .npz file.

    Images are uint8 `(N, H, W, 3)` or gray `(N, H, W)`; labels are integers `(N,)` or `(N, 1)`, 0 to C - 1 without a
    gap. The classes are named `0`, `1`, ... Views do not flip, because a mirrored image may be of another class.

    Raises:
        DataError: An array is missing, damaged, or of another dtype or shape.
    """
    arrays = read_npz(path, _KEYS, advice="write it again with np.savez")
    train, test = (
        ArraySplit(arrays[f"{part}_images"], _flat(arrays[f"{part}_labels"]), f"{part}_images of {path}")
        for part in ("train", "test")
    )
    classes = infer_class_names(train.labels, str(path))
    return Source(str(path), "npz", classes, train, test, default_view_spec(train.shape, flip=False))


def _flat(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return labels of shape (N, 1), which some collections store, as (N,)."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
