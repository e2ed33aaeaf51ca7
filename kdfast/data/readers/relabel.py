"""Sources with training labels changed on purpose, to test whether a score finds the changes.

The folder holds `relabelled.json` (path and fingerprint of the images, how the labels were changed, and their digest)
and `labels.npy`. It is a source like any other, with its own fingerprint, so every stage uses the same labels. The test
split keeps its labels.

Version 1 of `relabelled.json` has no seal and no digest: its labels are compared with what its share and seed give.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.source import Pixels, Source, Split, check_labels, sample_files
from kdfast.data.stateless_random import IntArray, Purpose, hash64, uniform_below
from kdfast.errors import DataError, OutputError, UsageError
from kdfast.files import (
    atomic_write,
    check_writable,
    delete_own,
    read_json,
    read_sealed,
    schemas,
    visible_entries,
    write_sealed,
)
from kdfast.files.arrays import read_npy
from kdfast.files.remembered import combine_stamps
from kdfast.files.validate import check_type

_RECORD = "relabelled.json"
_LABELS = "labels.npy"
_FORMAT = "kdfast relabelled 2"
_UNSEALED = "kdfast relabelled 1"
_FLIP_AGAIN = "run kdfast data flip again"


def flip_labels(labels: IntArray, share: float, seed: int, classes: int) -> IntArray:
    """Change the labels of a random share of the samples, uniformly to one of the other classes.

    Args:
        labels: int64 (N,), in [0, classes).
        share: Share of the samples, in (0, 1); exactly round(share * N) labels change.
        seed: Seed of the samples and of their new classes.
        classes: Number of classes, at least 2.

    Returns:
        int64 (N,), a new array.

    Raises:
        UsageError: The share is out of range or changes no label, or there is only one class.
    """
    if not (math.isfinite(share) and 0 < share < 1) or classes < 2:
        raise UsageError(
            f"`share` is {share} with {classes} classes: must be above 0 and below 1, with two classes or more"
        )
    ids = np.arange(len(labels), dtype=np.int64)
    count = round(share * len(labels))
    if count < 1:
        raise UsageError(f"`share` is {share} of {len(labels)} labels, which changes none: use a larger one")
    changed = np.argsort(hash64(Purpose.FLIP, seed, 0, ids), kind="stable")[:count]
    steps = 1 + uniform_below(hash64(Purpose.FLIP, seed, 1, changed), classes - 1)
    flipped = labels.copy()
    flipped[changed] = (flipped[changed] + steps) % classes
    return flipped


class RelabelledSplit:
    """A split with other labels.

    Args:
        split: Split of the images.
        labels: int64 (N,), one for each sample.

    Attributes:
        files: Path of each sample, or None.
    """

    def __init__(self, split: Split, labels: IntArray) -> None:
        self._split = split
        self._labels = check_labels(labels, len(split), "the new labels")
        self.files = sample_files(split)
        self.from_files = getattr(split, "from_files", False)

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

    def stamp(self) -> str | None:
        """Return a digest of the files of the images, and of the labels; None if it is not known."""
        return combine_stamps(self._split, self._labels.tobytes())


def replace_labels(source: Source, labels: IntArray) -> Source:
    """Return the source with other training labels; its fingerprint differs.

    Args:
        source: The data.
        labels: int64 (N,), one for each training sample.

    Raises:
        DataError: There is not one label per sample, or a label lies outside the classes.
    """
    return dataclasses.replace(source, train=RelabelledSplit(source.train, labels), recorded=None)


def write_flipped(
    source: Source, data: str, out: str | os.PathLike[str], *, share: float, seed: int, replace: bool = False
) -> IntArray:
    """Write a copy of a source, as a reference to its images, with a share of the training labels changed.

    Args:
        source: The original source.
        data: The path of the original source, recorded as an absolute path.
        out: The folder to write; new or empty.
        share: See `flip_labels`.
        seed: See `flip_labels`.
        replace: Replace what this function wrote to the folder before.

    Returns:
        int64 (m,), the samples with a changed label, ascending.

    Raises:
        UsageError: The share is out of range or changes no label.
        OutputError: The folder is not empty, or cannot be written.
    """
    labels = flip_labels(source.train.labels, share, seed, len(source.classes))
    if replace and is_relabelled(Path(out)):
        delete_own(out, (_RECORD, _LABELS))
    if entries := visible_entries(out):
        raise OutputError(f"{out} is not empty ({entries[0]}): use another folder")
    folder = check_writable(out)
    with atomic_write(folder / _LABELS) as file:
        np.save(file, labels)
    location = str(Path(data).resolve()) if Path(data).exists() else data
    record = {"format": _FORMAT, "data": location, "base": source.fingerprint, "share": share, "seed": seed}
    write_sealed(folder / _RECORD, {**record, "labels": _digest(labels)})
    return np.flatnonzero(labels != source.train.labels).astype(np.int64)


def is_relabelled(path: Path) -> bool:
    """Return whether `path` is a folder that `write_flipped` wrote."""
    return path.is_dir() and (path / _RECORD).is_file()


def open_relabelled(path: Path, open_base: Callable[[str], Source]) -> Source:
    """Open a folder that `write_flipped` wrote.

    Args:
        path: The folder.
        open_base: Opens the original source by its path.

    Raises:
        DataError: The record or the labels are damaged, or the original source has changed.
    """
    record = _read_record(path)
    _check_chain(path, record)
    labels = read_npy(path / _LABELS, dtype=np.int64, shape=(-1,), advice=_FLIP_AGAIN)
    base = open_base(record["data"])
    if base.fingerprint != record["base"]:
        raise DataError(f"{record['data']} has changed since {path} was made from it: {_FLIP_AGAIN}")
    if record["format"] == _UNSEALED:
        expected = _digest(flip_labels(base.train.labels, record["share"], record["seed"], len(base.classes)))
    else:
        expected = record["labels"]
    if _digest(labels) != expected:
        raise DataError(f"{path / _LABELS} does not hold the labels that were written to it: {_FLIP_AGAIN}")
    return dataclasses.replace(replace_labels(base, labels), path=str(path), kind="relabelled")


def _read_record(path: Path) -> dict[str, Any]:
    file = path / _RECORD
    record = read_json(file, advice=_FLIP_AGAIN)
    version = record.get("format") if isinstance(record, dict) else None
    if version not in (_FORMAT, _UNSEALED):
        raise DataError(f"{file} is damaged or of another version: {_FLIP_AGAIN}")
    if version == _FORMAT:
        try:
            record = read_sealed(file)
        except (OSError, ValueError) as error:
            raise DataError(f"{file} is damaged or was edited, its seal does not match: {_FLIP_AGAIN}") from error
    schema = schemas.RelabelledRecord if version == _FORMAT else schemas.RelabelledRecord1
    check_type(record, schema, file, advice=_FLIP_AGAIN)
    return dict(record)


def _check_chain(path: Path, record: Mapping[str, Any]) -> None:
    """Check that the sources which a record refers to, one after another, end at images.

    Raises:
        DataError: They lead back to one of them.
    """
    seen = {path.resolve()}
    while is_relabelled(base := Path(record["data"])):
        if base.resolve() in seen:
            raise DataError(f"{path / _RECORD} refers to itself, by way of {base}: {_FLIP_AGAIN}")
        seen.add(base.resolve())
        record = _read_record(base)


def _digest(labels: IntArray) -> str:
    return hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest()
