"""Data sources: two splits of equal-sized uint8 images, class names and a fingerprint.

A sample is identified everywhere by its index in the training split. The fingerprint is a digest of the decoded
training split, not of the bytes on disk, so a data set has the same fingerprint in every format.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kdfast.data.arrays import as_array
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import Normalization, ViewSpec
from kdfast.errors import DataError, SubsetError
from kdfast.files.remembered import remembered

Pixels = npt.NDArray[np.uint8]

_BLOCK_BYTES = 16 << 20
_FEW = 16
SUMS_KEY = "sums"  # the name under which `channel_sums` is remembered
_CROPS = 128  # recorded crops per sample, similar to the 162 views of padded CIFAR images


class Split(Protocol):
    """Interface of indexed, labeled images of one shape."""

    @property
    def labels(self) -> IntArray:
        """Class of each sample, int64 `(N,)`."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of every image, `(H, W, 3)`."""

    def __len__(self) -> int:
        """Number of samples, N."""

    def read(self, ids: npt.ArrayLike) -> Pixels:
        """Decode the samples `ids`, integers `(n,)` in any order, to uint8 RGB `(n, H, W, 3)`."""


class ArraySplit:
    """A split in memory.

    Args:
        images: uint8 `(N, H, W, 3)`, `(N, H, W, 1)` or `(N, H, W)`; gray images become three equal channels.
        labels: Integers `(N,)`.
        name: Name of the data in error messages, for example `train_images of shapes.npz`.

    Raises:
        DataError: The dtype or shape is wrong, there are no samples, or there is not one label per image.
    """

    def __init__(self, images: npt.NDArray[np.generic], labels: npt.ArrayLike, name: str) -> None:
        if images.dtype != np.uint8:
            raise DataError(f"{name} has dtype {images.dtype}: must be uint8, 0 to 255; rescale and convert the pixels")
        if images.ndim == 3:
            images = images[..., np.newaxis]
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
            raise DataError(f"{name} has shape {images.shape}: must be (N, H, W, 3) or (N, H, W), without a size of 0")
        if images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        self.images: Pixels = np.ascontiguousarray(images, dtype=np.uint8)
        self._labels = check_labels(labels, len(images), name)

    @property
    def labels(self) -> IntArray:
        """Class of each sample, int64 `(N,)`."""
        return self._labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of every image, `(H, W, 3)`."""
        height, width, channels = self.images.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.images)

    def read(self, ids: npt.ArrayLike) -> Pixels:
        """Copy the samples `ids`, integers `(n,)`, to a uint8 array `(n, H, W, 3)`."""
        return self.images[check_sample_ids(ids, len(self))]


@dataclass(frozen=True, eq=False)
class Source:
    """A data set: its path, its class names and its two splits.

    Args:
        path: The path that was opened.
        kind: The reader that opened it, a key of SOURCES or `datasets`.
        classes: Class names; a label is an index into them.
        train: The split that is scored, pruned and trained on.
        test: The split for evaluation only; same image shape.
        view_spec: The augmentation of the data.
        recorded: Fingerprint recorded when the data was written, if the reader has checked that the files are
            unchanged since then; else None.
        notes: What the reader left out or decided, one sentence each.

    Raises:
        DataError: A label lies outside the classes, or the splits have different image shapes.
    """

    path: str
    kind: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    view_spec: ViewSpec
    recorded: str | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.train.shape != self.test.shape:
            raise DataError(
                f"{self.path}: training images are {self.train.shape}, test images {self.test.shape}; they must agree"
            )
        for split, name in ((self.train, "training"), (self.test, "test")):
            low, high = int(split.labels.min()), int(split.labels.max())
            if low < 0 or high >= len(self.classes):
                raise DataError(
                    f"{self.path}: {name} labels go from {low} to {high}, but there are {len(self.classes)} classes "
                    f"(labels 0 to {len(self.classes) - 1}); correct the labels"
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the decoded training split (see `compute_fingerprint`), unless recorded; computed on first use."""
        return compute_fingerprint(self.train, len(self.classes)) if self.recorded is None else self.recorded

    @functools.cached_property
    def gray(self) -> bool:
        """Whether all training images are gray, their three channels equal; computed on first use."""
        return remembered(self.train, "gray", lambda: [int(_is_gray(self.train))]) == [1]


class DataDigest:
    """SHA-256 of the sample count, class count and image shape, then the decoded pixels, then the labels.

    Args:
        count: Number of samples, N.
        classes: Number of classes; their names are not part of the digest.
        shape: Image shape `(H, W, 3)`.
    """

    def __init__(self, count: int, classes: int, shape: Sequence[int]) -> None:
        head = {"samples": count, "classes": classes, "shape": [int(side) for side in shape]}
        self._hash = hashlib.sha256(json.dumps(head, sort_keys=True).encode())

    def update(self, pixels: Pixels) -> None:
        """Add the next images, uint8 `(n, H, W, 3)`, in index order."""
        self._hash.update(np.ascontiguousarray(pixels).data)

    def finish(self, labels: IntArray) -> str:
        """Add all labels, int64 `(N,)`, and return the digest in hexadecimal."""
        self._hash.update(labels.astype("<i8").tobytes())
        return self._hash.hexdigest()


def compute_fingerprint(split: Split, classes: int) -> str:
    """Return the digest of a decoded split in index order, read in blocks.

    Args:
        split: The split.
        classes: Number of classes.

    Returns:
        SHA-256 in hexadecimal; equal for equal pixels and labels in the same order, independent of the file format.
    """
    return remembered(split, fingerprint_key(classes), lambda: digest_split(split, classes))


def fingerprint_key(classes: int) -> str:
    """Return the name under which a fingerprint is remembered."""
    return f"fingerprint of {classes} classes"


def digest_split(split: Split, classes: int) -> str:
    """Return the fingerprint of a split, computed."""
    digest = DataDigest(len(split), classes, split.shape)
    for ids in id_blocks(split):
        digest.update(split.read(ids))
    return digest.finish(split.labels)


def compute_normalization(split: Split) -> Normalization:
    """Return the mean and standard deviation of each channel over all pixels of a split, on the scale 0 to 1.

    The sums are exact integers, so the result does not depend on the block size or the machine.

    Raises:
        DataError: A channel is constant.
    """
    totals = remembered(split, SUMS_KEY, lambda: channel_sums(split))
    sums, square_sums = totals[:3], totals[3:]
    count = len(split) * split.shape[0] * split.shape[1]
    mean = [first / count / 255 for first in sums]
    std = [
        ((count * second - first * first) / count**2) ** 0.5 / 255
        for first, second in zip(sums, square_sums, strict=True)
    ]
    if 0.0 in std:
        raise DataError("the training images have a constant channel, which cannot be normalized: check the data")
    return Normalization((mean[0], mean[1], mean[2]), (std[0], std[1], std[2]))


def sample_files(split: Split) -> Sequence[str] | None:
    """Return the path of each sample's file; None if the samples are no files of their own."""
    return getattr(split, "files", None)


def _is_gray(split: Split) -> bool:
    few = np.arange(min(len(split), _FEW), dtype=np.int64)  # images with color end the search early
    pixels = (split.read(ids) for ids in (few, *id_blocks(split)))
    return all(np.array_equal(block[..., :1].repeat(3, axis=-1), block) for block in pixels)


def channel_sums(split: Split) -> list[int]:
    """Return the sums of the values of each channel of a split, then those of their squares, computed."""
    totals = np.zeros((2, 3), np.int64)
    for ids in id_blocks(split):
        pixels = split.read(ids).reshape(-1, 3)
        totals[0] += pixels.sum(0, dtype=np.int64)
        # 255**2 fits in 16 bits, so the squares take a quarter of the memory of int64.
        totals[1] += np.square(pixels, dtype=np.uint16).sum(0, dtype=np.int64)
    return [int(total) for total in totals.reshape(-1)]


def id_blocks(split: Split) -> Iterator[IntArray]:
    """Yield all sample ids of a split in index order, in blocks that decode to about 16 MiB."""
    step = max(1, _BLOCK_BYTES // int(np.prod(split.shape)))
    for start in range(0, len(split), step):
        yield np.arange(start, min(start + step, len(split)), dtype=np.int64)


def check_sample_ids(ids: npt.ArrayLike, count: int) -> IntArray:
    """Check sample ids and copy them to a new int64 array `(n,)`.

    Raises:
        SubsetError: The ids are not one-dimensional integers, or lie outside `[0, count)`.
    """
    given = np.asarray(ids)
    if given.shape == (0,):
        return np.empty(0, np.int64)  # an empty list has numpy's default dtype, which is float
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        hint = "; convert a mask with np.flatnonzero" if given.dtype == np.bool_ else ""
        raise SubsetError(f"sample ids are {given.dtype} of shape {given.shape}: must be integers of shape (n,){hint}")
    if given.min() < 0 or given.max() >= count:
        raise SubsetError(
            f"sample ids go from {given.min()} to {given.max()}; the split has {count} samples, ids 0 to {count - 1}"
        )
    return given.astype(np.int64, order="C")


def check_epoch_ids(ids: npt.ArrayLike, count: int, batch_size: int) -> IntArray:
    """Check the ids of one pass over the data and copy them, so that later changes by the caller have no effect.

    Args:
        ids: Distinct integers `(n,)`, n >= 1.
        count: Number of samples of the split.
        batch_size: Samples per batch, >= 1; the last batch may be smaller.

    Returns:
        An int64 copy `(n,)`.

    Raises:
        SubsetError: The ids are not one-dimensional integers, empty, out of range or repeated, or `batch_size` < 1.
    """
    if batch_size < 1:
        raise SubsetError(f"`batch_size` is {batch_size}: pass at least 1")
    order = check_sample_ids(ids, count)
    if not order.size:
        raise SubsetError("there are no sample ids to load: pass at least one")
    counts = np.bincount(order)
    if counts.max() > 1:
        raise SubsetError(f"sample id {int(counts.argmax())} occurs {int(counts.max())} times: pass each id once")
    return order


def check_labels(labels: npt.ArrayLike, count: int, name: str) -> IntArray:
    """Check that there is one integer label per image, and return the labels as int64 `(N,)`.

    Raises:
        DataError: The dtype, shape or number is wrong.
    """
    given = as_array(labels, f"{name}: the labels", f"one integer per image, ({count},)")
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or len(given) != count:
        raise DataError(
            f"{name}: the labels are {given.dtype} of shape {given.shape}: must be one integer per image, ({count},)"
        )
    return given.astype(np.int64)


def infer_class_names(train: IntArray, name: str) -> tuple[str, ...]:
    """Return class names `0`, `1`, ... for data without names, one for each label up to the largest.

    Raises:
        DataError: A label is negative, or no training sample has one of the labels below the largest.
    """
    if train.min() < 0:
        raise DataError(f"{name}: the smallest training label is {train.min()}: must be 0; use labels 0, 1, 2, ...")
    # The largest label may be garbage, so allocate no array of that size before the check.
    distinct = np.unique(train)
    gaps = np.flatnonzero(distinct != np.arange(len(distinct)))
    if gaps.size:
        raise DataError(
            f"{name}: no training sample has label {int(gaps[0])}, but some have {int(distinct[-1])}; "
            "number the classes 0, 1, 2, ... without a gap"
        )
    return tuple(str(label) for label in range(len(distinct)))


def default_view_spec(shape: Sequence[int], *, flip: bool) -> ViewSpec:
    """Return the augmentation for data without a conventional one.

    Images below 64 pixels are shifted by up to an eighth of their smaller side, and mirrored with `flip`. Larger images
    get random resized crops of their own size, mirrored, wherever they come from.
    """
    height, width = int(shape[0]), int(shape[1])
    if min(height, width) < 64:
        return ViewSpec(kind="shift", size=(height, width), pad=max(1, min(height, width) // 8), flip=flip)
    return ViewSpec(kind="crop", size=(height, width), flip=True, crops=_CROPS)
