"""The held-out part of the training split, and a part of a split as a split of its own."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdfast.data.source import Pixels, Split, check_sample_ids, sample_files
from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.data.subset.budgets import class_budgets
from kdfast.errors import DataError
from kdfast.files.remembered import combine_stamps


def hold_out(
    labels: IntArray, classes: int, *, share: float = 0.05, least: int = 20, seed: int = 0
) -> tuple[IntArray, IntArray]:
    """Split the training set into a pool and a held-out set to evaluate on; the test split takes no part.

    The split depends only on the arguments, so that everything that is computed from one teacher and seed can share it.
    A teacher was usually trained on the held-out samples too.

    Args:
        labels: int64 (N,), classes in [0, C).
        classes: C.
        share: Share of each class to hold out, in (0, 0.5].
        least: Minimum number of samples to hold out of each class, but never more than half of it; a class with one
            sample keeps it in the pool.
        seed: Seed of the split.

    Returns:
        The pool and the held-out set: positions, int64, ascending, disjoint; their union is the training set.

    Raises:
        DataError: No class has two samples, or a label is outside [0, C).
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(
            f"labels range from {labels.min()} to {labels.max()}: the teacher has the classes 0 to {classes - 1}; use "
            "a teacher of this data"
        )
    sizes = np.bincount(labels, minlength=classes)
    if sizes.max() < 2:
        raise DataError(
            "every class has a single training sample, and one must be held out of a class of two: use another method"
        )
    counts = np.minimum(np.maximum(np.ceil(share * sizes).astype(np.int64), least), sizes // 2)
    keys = hash64(Purpose.HOLDOUT, seed, np.arange(len(labels), dtype=np.int64))
    order = np.lexsort((keys, labels))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    held_out = np.sort(np.concatenate([order[s : s + n] for s, n in zip(starts, counts, strict=True)]))
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), held_out), held_out


def stratified_sample(labels: IntArray, count: int, *, seed: int = 0) -> IntArray:
    """Draw `count` samples, of each class in proportion to its size and at least one; int64, ascending.

    The draw depends only on the arguments, and is independent of `hold_out` with the same seed.

    Raises:
        SubsetError: There are fewer samples than `count`, or more classes.
    """
    budgets = class_budgets(labels, count)
    keys = hash64(Purpose.HOLDOUT, seed, count, np.arange(len(labels), dtype=np.int64))
    order = np.lexsort((keys, labels))
    starts = np.cumsum(np.bincount(labels)) - np.bincount(labels)
    return np.sort(np.concatenate([order[s : s + n] for s, n in zip(starts, budgets, strict=True)]))


class SplitPart:
    """Some samples of a split, numbered from 0.

    Args:
        split: The split.
        ids: Integers (n,), the samples, in the order of their new numbers.

    Raises:
        SubsetError: The ids are not one-dimensional integers, or outside of the split.
    """

    def __init__(self, split: Split, ids: npt.ArrayLike) -> None:
        self._split, self._ids = split, check_sample_ids(ids, len(split))
        self._labels = split.labels[self._ids]
        self.from_files = getattr(split, "from_files", False)

    @property
    def labels(self) -> IntArray:
        """Class of each sample, int64 `(n,)`."""
        return self._labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of every image, `(H, W, 3)`."""
        return self._split.shape

    @property
    def files(self) -> list[str] | None:
        """Path of each sample's file; None if the samples are no files."""
        files = sample_files(self._split)
        return None if files is None else [files[index] for index in self._ids]

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, ids: npt.ArrayLike) -> Pixels:
        """Decode samples, integers `(b,)` in [0, n), to uint8 RGB `(b, H, W, 3)`."""
        return self._split.read(self._ids[check_sample_ids(ids, len(self))])

    def stamp(self) -> str | None:
        """Return a digest of the files that the samples are read from, and of the ids; None if it is not known."""
        return combine_stamps(self._split, self._ids.tobytes())
