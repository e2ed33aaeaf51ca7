"""Training labels changed on purpose: a source whose images are another's, to see whether a score finds the changes.

A folder with `relabelled.json` (where the images lie, their fingerprint, how the labels were made) and `labels.npy`.
It is a source like any other, with a fingerprint of its own, so every stage sees the same changed labels. The test
split keeps its labels.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kdfast.data.source import Pixels, Source, Split, integer_labels
from kdfast.data.stateless_random import IntArray, Purpose, hash64, uniform_below
from kdfast.errors import DataError, OutputError, UsageError
from kdfast.files import atomic_write, check_writable, read_json, visible_entries, write_json

_RECORD = "relabelled.json"
_LABELS = "labels.npy"
_FORMAT = "kdfast relabelled 1"


def flip_labels(labels: IntArray, share: float, seed: int, classes: int) -> IntArray:
    """Give a random share of the samples another class, each of the others with the same probability.

    Args:
        labels: int64 (N,), in [0, classes).
        share: Share of the samples, in (0, 1); exactly round(share * N) labels change.
        seed: Seed of the choice of samples and of their new classes.
        classes: Number of classes, at least 2.

    Returns:
        int64 (N,), a new array.

    Raises:
        UsageError: If the share is out of range or changes no label, or there is one class only.
    """
    if not (math.isfinite(share) and 0 < share < 1) or classes < 2:
        raise UsageError(f"a share of {share} in {classes} classes: needed: a share in (0, 1) and two classes or more")
    ids = np.arange(len(labels), dtype=np.int64)
    count = round(share * len(labels))
    if count < 1:
        raise UsageError(f"a share of {share} of {len(labels)} labels changes none; give a larger one")
    chosen = np.argsort(hash64(Purpose.FLIP, seed, 0, ids), kind="stable")[:count]
    steps = 1 + uniform_below(hash64(Purpose.FLIP, seed, 1, chosen), classes - 1)
    flipped = labels.copy()
    flipped[chosen] = (flipped[chosen] + steps) % classes
    return flipped


class RelabelledSplit:
    """A split with other labels.

    Args:
        split: Where the images come from.
        labels: int64 (N,), one for each of its samples.
    """

    def __init__(self, split: Split, labels: IntArray) -> None:
        self._split = split
        self._labels = integer_labels(labels, len(split), "the new labels")

    @property
    def labels(self) -> IntArray:
        """Class of each sample, int64 `(N,)`."""
        return self._labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of every image, `(H, W, 3)`."""
        return self._split.shape

    def __len__(self) -> int:
        return len(self._split)

    def read(self, ids: npt.ArrayLike) -> Pixels:
        """Decode the samples `ids` to uint8 RGB `(n, H, W, 3)`."""
        return self._split.read(ids)


def relabelled(source: Source, labels: IntArray) -> Source:
    """The same source with other training labels; its fingerprint differs.

    Args:
        source: The data.
        labels: int64 (N,), one for each training sample.

    Raises:
        DataError: If there is not one label a sample, or one lies outside the classes.
    """
    return dataclasses.replace(source, train=RelabelledSplit(source.train, labels), recorded=None)


def write_flipped(source: Source, data: str, out: str | os.PathLike[str], *, share: float, seed: int) -> IntArray:
    """Write a source whose training labels are those of another with a share of them flipped.

    Args:
        source: The other source.
        data: The path it was opened by, recorded as an absolute one.
        out: The folder to write; new or empty.
        share: See `flip_labels`.
        seed: See `flip_labels`.

    Returns:
        int64 (m,), the samples whose label changed, ascending.

    Raises:
        UsageError: If the share does not fit.
        OutputError: If the folder holds something, or cannot be written.
    """
    labels = flip_labels(source.train.labels, share, seed, len(source.classes))
    if visible_entries(out):
        raise OutputError(f"{out} is not empty; choose another folder")
    folder = check_writable(out)
    with atomic_write(folder / _LABELS) as file:
        np.save(file, labels)
    place = str(Path(data).resolve()) if Path(data).exists() else data
    record = {"format": _FORMAT, "data": place, "base": source.fingerprint, "share": share, "seed": seed}
    write_json(folder / _RECORD, record)
    return np.flatnonzero(labels != source.train.labels).astype(np.int64)


def is_relabelled(path: Path) -> bool:
    """Whether `path` is a folder with the record of changed labels."""
    return path.is_dir() and (path / _RECORD).is_file()


def open_relabelled(path: Path, open_base: Callable[[str], Source]) -> Source:
    """Open what `write_flipped` wrote.

    Args:
        path: The folder.
        open_base: Opens the source of the images.

    Raises:
        DataError: If the record or the labels are damaged, or the images are no longer those they were made for.
    """
    record = read_json(path / _RECORD)
    if not isinstance(record, dict) or record.get("format") != _FORMAT or not {"data", "base"} <= record.keys():
        raise DataError(f"{path / _RECORD} is damaged or of another version; run `kdfast data flip` again")
    try:
        labels = np.load(path / _LABELS, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path / _LABELS} ({error}); run `kdfast data flip` again") from error
    base = open_base(str(record["data"]))
    if base.fingerprint != record["base"]:
        raise DataError(f"{record['data']} has changed since {path} was made of it; run `kdfast data flip` again")
    return dataclasses.replace(relabelled(base, labels), path=str(path), kind="relabelled")
