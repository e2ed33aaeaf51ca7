"""What a data source is to the rest of kdfast: two splits of equal-sized uint8 images, class names and a fingerprint.

A sample's identity is its index in the training split, everywhere. The fingerprint is a digest of what the training
split decodes to, not of the bytes on the disk, so one data set has one fingerprint whatever format holds it.
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

from kdfast.data.stateless_random import IntArray
from kdfast.data.views import Normalization, ViewSpec
from kdfast.errors import DataError, SubsetError

Pixels = npt.NDArray[np.uint8]

_BLOCK_BYTES = 16 << 20
_CROPS = 128  # recorded crops per sample: as many views, about, as padded CIFAR images have


class Split(Protocol):
    """Indexed, labelled images of one shape."""

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
    """A split held in memory.

    Args:
        images: uint8 `(N, H, W, 3)`, `(N, H, W, 1)` or `(N, H, W)`; grey images become three equal channels.
        labels: Integers `(N,)`.
        name: What to call the data in error messages, for example `train_images of shapes.npz`.

    Raises:
        DataError: Another dtype or shape, no samples, or not one label per image.
    """

    def __init__(self, images: npt.NDArray[np.generic], labels: npt.ArrayLike, name: str) -> None:
        if images.dtype != np.uint8:
            raise DataError(f"{name} has dtype {images.dtype}; needed: uint8, 0 to 255; rescale and convert the pixels")
        if images.ndim == 3:
            images = images[..., np.newaxis]
        if images.ndim != 4 or images.shape[-1] not in (1, 3) or 0 in images.shape:
            raise DataError(f"{name} has shape {images.shape}; needed: (N, H, W, 3) or (N, H, W), none of them 0")
        if images.shape[-1] == 1:
            images = np.repeat(images, 3, axis=-1)
        self.images: Pixels = np.ascontiguousarray(images, dtype=np.uint8)
        self._labels = integer_labels(labels, len(images), name)

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
        """Copy the samples `ids`, integers `(n,)`, to uint8 `(n, H, W, 3)`."""
        return self.images[index_array(ids, len(self))]


@dataclass(frozen=True, eq=False)
class Source:
    """A data set: where it lies, what its classes are called, and its two splits.

    Args:
        path: What was opened.
        kind: Which reader opened it, a key of SOURCES (or `datasets`).
        classes: Class names; a label is an index into them.
        train: The split that is scored, pruned and trained on.
        test: The split that is only evaluated on; same image shape.
        views: The augmentation that belongs to the data.
        recorded: Fingerprint from the time when the data was written; None where there is no such record.
        trusted: Whether the files are those of that time, so that it need not be computed again; it is otherwise, and
            must be the same.

    Raises:
        DataError: Labels outside the classes, or splits of different image shapes.
    """

    path: str
    kind: str
    classes: tuple[str, ...]
    train: Split
    test: Split
    views: ViewSpec
    recorded: str | None = None
    trusted: bool = False

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
                    f"(labels 0 to {len(self.classes) - 1}); repair the labels"
                )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of the decoded training split (see `fingerprint_of`); computed on first use.

        Raises:
            DataError: It is not the recorded one.
        """
        if self.recorded is not None and self.trusted:
            return self.recorded
        found = fingerprint_of(self.train, len(self.classes))
        if self.recorded not in (None, found):
            raise DataError(
                f"{self.path} does not hold the training samples that were written there (fingerprint {found[:12]}, "
                f"recorded {str(self.recorded)[:12]}): it is damaged or was changed; convert the data again"
            )
        return found


class DataDigest:
    """SHA-256 over the sample count, the class count, the image shape, then decoded pixels, then labels.

    Args:
        count: Number of samples, N.
        classes: Number of classes (their names are not part of the identity).
        shape: Image shape `(H, W, 3)`.
    """

    def __init__(self, count: int, classes: int, shape: Sequence[int]) -> None:
        head = {"samples": count, "classes": classes, "shape": [int(side) for side in shape]}
        self._hash = hashlib.sha256(json.dumps(head, sort_keys=True).encode())

    def update(self, pixels: Pixels) -> None:
        """Add the next images in index order, uint8 `(n, H, W, 3)`."""
        self._hash.update(np.ascontiguousarray(pixels).data)

    def finish(self, labels: IntArray) -> str:
        """Add all labels, int64 `(N,)`, and return the digest in hexadecimal."""
        self._hash.update(labels.astype("<i8").tobytes())
        return self._hash.hexdigest()


def fingerprint_of(split: Split, classes: int) -> str:
    """Digest of a decoded split in index order, read in blocks.

    Args:
        split: The split.
        classes: Number of classes.

    Returns:
        SHA-256 in hexadecimal; equal for equal pixels and labels in equal order, whatever the file format.
    """
    digest = DataDigest(len(split), classes, split.shape)
    for ids in id_blocks(split):
        digest.update(split.read(ids))
    return digest.finish(split.labels)


def normalization_of(split: Split) -> Normalization:
    """Mean and standard deviation per channel over all pixels of a split, in units of the full range (0 to 1).

    The sums are exact integers, so the result does not depend on the block size or the machine.

    Raises:
        DataError: A channel has the same value everywhere.
    """
    total, squares = [0, 0, 0], [0, 0, 0]
    for ids in id_blocks(split):
        pixels = split.read(ids).reshape(-1, 3)
        # 255^2 fits 16 bits: the squares take a quarter of the memory of int64.
        for channel, (one, two) in enumerate(
            zip(pixels.sum(0, dtype=np.int64), np.square(pixels, dtype=np.uint16).sum(0, dtype=np.int64), strict=True)
        ):
            total[channel] += int(one)
            squares[channel] += int(two)
    count = len(split) * split.shape[0] * split.shape[1]
    mean = [one / count / 255 for one in total]
    spread = [((count * two - one * one) / count**2) ** 0.5 / 255 for one, two in zip(total, squares, strict=True)]
    if 0.0 in spread:
        raise DataError("the training images have a channel of constant value; it cannot be normalised: check the data")
    return Normalization((mean[0], mean[1], mean[2]), (spread[0], spread[1], spread[2]))


def id_blocks(split: Split) -> Iterator[IntArray]:
    """All sample ids of a split in index order, in blocks that decode to about 16 MiB."""
    step = max(1, _BLOCK_BYTES // int(np.prod(split.shape)))
    for start in range(0, len(split), step):
        yield np.arange(start, min(start + step, len(split)), dtype=np.int64)


def index_array(ids: npt.ArrayLike, count: int) -> IntArray:
    """Check sample ids and copy them to a fresh int64 array `(n,)`.

    Raises:
        SubsetError: Not one-dimensional integers, or outside `[0, count)`.
    """
    given = np.asarray(ids)
    if given.shape == (0,):
        return np.empty(0, np.int64)  # an empty list has numpy's default dtype, which is float
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer):
        hint = "; turn a mask into ids with np.flatnonzero" if given.dtype == np.bool_ else ""
        raise SubsetError(f"sample ids are {given.dtype} of shape {given.shape}; needed: integers of shape (n,){hint}")
    if given.min() < 0 or given.max() >= count:
        raise SubsetError(
            f"sample ids go from {given.min()} to {given.max()}; the split has {count} samples, ids 0 to {count - 1}"
        )
    return given.astype(np.int64, order="C")


def epoch_ids(ids: npt.ArrayLike, count: int, batch_size: int) -> IntArray:
    """Check the ids of one pass over the data and copy them, so that a later change by the caller has no effect.

    Args:
        ids: Integers `(n,)`, n >= 1, no id twice.
        count: Number of samples of the split.
        batch_size: Samples per batch, >= 1; the last batch may be smaller, and the only one too.

    Returns:
        A private int64 copy `(n,)`.

    Raises:
        SubsetError: Not one-dimensional integers, none at all, out of range, or an id twice; or `batch_size` < 1.
    """
    if batch_size < 1:
        raise SubsetError(f"the batch size is {batch_size}; needed: 1 or more")
    order = index_array(ids, count)
    if not order.size:
        raise SubsetError("there are no sample ids to load; needed: at least one")
    seen = np.bincount(order)
    if seen.max() > 1:
        raise SubsetError(f"sample id {int(seen.argmax())} is there {int(seen.max())} times; needed: each id once")
    return order


def integer_labels(labels: npt.ArrayLike, count: int, name: str) -> IntArray:
    """Check that there is one integer label per image and return them as int64 `(N,)`.

    Raises:
        DataError: Another dtype, shape or number.
    """
    given = np.asarray(labels)
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or len(given) != count:
        raise DataError(
            f"{name}: the labels are {given.dtype} of shape {given.shape}; needed: one integer per image, ({count},)"
        )
    return given.astype(np.int64)


def inferred_classes(train: IntArray, name: str) -> tuple[str, ...]:
    """Class names `0`, `1`, ... for data that brings none: one per label up to the largest.

    Raises:
        DataError: Negative labels, or a label below the largest that no training sample has.
    """
    if train.min() < 0:
        raise DataError(f"{name}: the smallest training label is {train.min()}; needed: labels 0, 1, 2, ...")
    # The largest label may be garbage: compare with the distinct ones before any array of that size is made.
    distinct = np.unique(train)
    gaps = np.flatnonzero(distinct != np.arange(len(distinct)))
    if gaps.size:
        raise DataError(
            f"{name}: no training sample has label {int(gaps[0])}, but some have {int(distinct[-1])}; "
            "number the classes 0, 1, 2, ... without a gap"
        )
    return tuple(str(label) for label in range(len(distinct)))


def generic_views(shape: Sequence[int], *, flip: bool) -> ViewSpec:
    """The augmentation of data whose conventional one is not known.

    Images below 64 pixels are shifted by up to an eighth of their smaller side; larger ones get random resized crops
    of their own size.
    """
    height, width = int(shape[0]), int(shape[1])
    if min(height, width) < 64:
        return ViewSpec(kind="shift", size=(height, width), pad=max(1, min(height, width) // 8), flip=flip)
    return ViewSpec(kind="crop", size=(height, width), flip=flip, crops=_CROPS)
