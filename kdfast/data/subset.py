"""Subset files: the training samples to keep.

`idx.npy` is a one-dimensional int64 array of original training indices, in any order, as np.save writes it. If kdfast
wrote it, its provenance (the data and the method) is in `idx.json` beside it. Files that would train on the wrong
samples are rejected.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import math
import os
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import kdfast
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError, SubsetError, UsageError
from kdfast.files import (
    atomic_write,
    check_replaceable,
    check_writable,
    matches_seal,
    read_json,
    schemas,
    seal,
    without_seal,
    write_json,
)
from kdfast.files.arrays import read_npy


@dataclass(frozen=True)
class Subset:
    """The samples to keep.

    Attributes:
        ids: `(k,)` int64 original training indices, distinct, in the order of the file.
        provenance: Content of `idx.json`, or None without one.
        path: The file, or None.
    """

    ids: IntArray
    provenance: dict[str, Any] | None
    path: Path | None


def read_subset(
    path: str | os.PathLike[str], *, n: int, fingerprint: str | None = None, batch_size: int | None = None
) -> Subset:
    """Read a subset file and check that it matches the data.

    Args:
        path: The .npy file.
        n: Number of training samples of the data.
        fingerprint: Fingerprint of the data, compared with the provenance if there is one. None: not compared.
        batch_size: The subset must fill at least one batch of this size. None: not checked.

    Raises:
        SubsetError: The file is missing, damaged, not a plain int64 vector, empty, has repeated or out-of-range
            indices, fills no batch, or belongs to other data.
    """
    file = Path(path)
    ids = _check_ids(_load(file), str(file))
    provenance = _read_provenance(file, ids)
    if provenance is not None and fingerprint is not None and provenance["data"] != fingerprint:
        raise SubsetError(
            f"{file} was made from other data (fingerprint {provenance['data'][:12]}; this data: {fingerprint[:12]}) "
            "and would select the wrong samples; prune this data again"
        )
    _check_range(ids, str(file), n)
    if batch_size is not None and len(ids) < batch_size:
        raise SubsetError(
            f"{file} keeps {len(ids)} samples, fewer than one batch of {batch_size}: keep more or lower `batch_size`"
        )
    return Subset(ids, provenance, file)


def check_subset_file(path: str | os.PathLike[str]) -> None:
    """Run the checks of `read_subset` that do not need the data, before the data is opened.

    Raises:
        SubsetError: The file is missing, damaged, not a plain int64 vector, empty, or has repeated or negative indices.
    """
    _check_ids(_load(Path(path)), str(path))


def check_subset_path(path: str | os.PathLike[str]) -> None:
    """Run the checks of `write_subset` on a path, before the work that computes the subset.

    Nothing is written, and the folder need not exist.

    Args:
        path: The .npy file to write.

    Raises:
        UsageError: `path` does not end in .npy.
        OutputError: The existing file, or the .json beside it, was not written by kdfast, or changed since.
    """
    file = Path(path)
    if file.suffix != ".npy":
        raise UsageError(f"{file} is not a valid name of a subset file: rename it to end in .npy")
    with _folder_for_one_writer(file.parent):
        _check_replaceable(file)


def write_subset(path: str | os.PathLike[str], ids: npt.NDArray[Any], provenance: Mapping[str, Any]) -> None:
    """Write a subset file and its provenance beside it, each atomically.

    Args:
        path: The .npy file to write; the provenance has the same name with .json. A missing folder is created.
        ids: `(k,)` int64 original training indices, in any order.
        provenance: JSON values; "data" must be the fingerprint of the data. By convention also method, parameters,
            seed, scores (their fingerprint) and seconds. A digest of the ids and the version of kdfast are added.

    Raises:
        SubsetError: The ids are not a subset, or the fingerprint is missing.
        UsageError: `path` does not end in .npy.
        OutputError: A file cannot be written, or would replace one that kdfast did not write.
    """
    file, beside = Path(path), Path(path).with_suffix(".json")
    check_subset_path(file)
    if not isinstance(provenance.get("data"), str):
        raise SubsetError(
            f"`provenance` has the keys {sorted(provenance)}: must include 'data', the fingerprint of the data"
        )
    checked = _check_ids(ids, "the subset to write")
    check_writable(file.parent)
    with _folder_for_one_writer(file.parent):
        _check_replaceable(file)
        # The old ids go first: beside the new provenance they would look like ids that someone changed.
        file.unlink(missing_ok=True)
        write_json(beside, seal({**provenance, "ids": _digest(checked), "kdfast": kdfast.__version__}))
        with atomic_write(file) as stream:
            np.save(stream, checked, allow_pickle=False)


def subset_size(n: int, fraction: float) -> int:
    """Return the number of samples that a fraction keeps: `round(fraction * n)`, halves to even.

    Args:
        n: Number of training samples.
        fraction: Fraction to keep, in (0, 1].

    Raises:
        SubsetError: The fraction is out of range or keeps no sample.
    """
    if not 0 < fraction <= 1:
        raise SubsetError(f"`fraction` is {fraction}: must be above 0 and at most 1")
    size = round(fraction * n)
    if size < 1:
        raise SubsetError(f"`fraction` is {fraction} of {n} samples, which keeps none: use a larger one")
    return size


def class_budgets(
    labels: IntArray,
    total: int,
    mode: Literal["proportional", "equal"] = "proportional",
    available: IntArray | None = None,
) -> IntArray:
    """Return the number of samples to keep of each class, `total` in sum, at least one of each.

    "proportional": in proportion to the class sizes, by largest remainder; a class whose share rounds to none keeps one
    sample, and the others divide the rest. "equal": the same number of each class, or one more if `total` is not
    divisible by the number of classes; a class with fewer samples keeps all of them, and the others divide the rest.
    Ties go to the lower label.

    Args:
        labels: `(n,)` int64 from 0; the classes are 0 to the largest label.
        total: Samples to keep, in `[1, n]`.
        mode: "proportional" or "equal".
        available: `(classes,)` int64, the samples that may be kept of each class: at least one of each class that has
            samples, and at least `total` in sum. A class that has too few keeps all of these, and the others divide the
            rest. None: all samples.

    Returns:
        `(classes,)` int64; 0 only for a class without samples.

    Raises:
        SubsetError: `total` is out of range, or smaller than the number of classes.
    """
    if not 1 <= total <= len(labels):
        raise SubsetError(f"{total} samples to keep of {len(labels)}: must be 1 to {len(labels)}")
    if mode not in ("proportional", "equal"):
        raise SubsetError(f"`mode` of class budgets is {mode!r}: must be 'proportional' or 'equal'")
    sizes = np.bincount(labels).astype(np.int64)
    classes = int((sizes > 0).sum())
    if total < classes:
        raise SubsetError(
            f"keeping {total} of {len(labels)} samples leaves {classes - total} classes empty: keep at least "
            f"{classes}, one of each class, which is a `fraction` of {_round_up(classes / len(labels))}"
        )
    if mode == "equal":
        return _equal_budgets(sizes if available is None else available, total)
    return _proportional_budgets(sizes, total) if available is None else _capped_budgets(sizes, total, available)


def _capped_budgets(sizes: IntArray, total: int, available: IntArray) -> IntArray:
    capped = np.zeros(len(sizes), np.bool_)
    while True:
        shared = _proportional_budgets(np.where(capped, 0, sizes), total - int(available[capped].sum()))
        budgets = np.where(capped, available, shared)
        if (budgets <= available).all():
            return budgets
        capped |= budgets > available  # the share of the others only grows, so these stay too small


def _proportional_budgets(sizes: IntArray, total: int) -> IntArray:
    rest, budgets = sizes, np.zeros_like(sizes)
    while True:
        shared = total - int(budgets[rest == 0].sum())
        floor, remainder = np.divmod(shared * rest, max(1, rest.sum()))
        floor[np.argsort(-remainder, kind="stable")[: shared - int(floor.sum())]] += 1
        empty = (floor == 0) & (rest > 0)
        if not empty.any():
            return np.where(rest > 0, floor, budgets)
        budgets[empty] = 1
        rest = np.where(empty, 0, rest)


def _equal_budgets(sizes: IntArray, total: int) -> IntArray:
    budgets, open_classes = np.zeros_like(sizes), sizes > 0
    while True:
        each, more = divmod(total - int(budgets.sum()), max(1, int(open_classes.sum())))
        full = open_classes & (sizes <= each)
        if not full.any():
            budgets[open_classes] = each
            budgets[np.flatnonzero(open_classes)[:more]] += 1
            return budgets
        budgets[full] = sizes[full]
        open_classes &= ~full


def _round_up(share: float) -> str:
    """Return a share with four digits after the point, rounded up."""
    return f"{math.ceil(share * 1e4 - 1e-9) / 1e4:g}"


@contextlib.contextmanager
def _folder_for_one_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process writes a subset there, so that both files of a subset come from one of them."""
    if not folder.is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _load(file: Path) -> npt.NDArray[Any]:
    if file.is_file() and zipfile.is_zipfile(file):
        raise SubsetError(
            f"{file} is a zip archive, as np.savez and torch.save write: load the indices, and write them alone with "
            "np.save(path, ids)"
        )
    return read_npy(file, error=SubsetError, advice="pickles are not read; write it with np.save(path, ids)")


def _check_ids(ids: npt.NDArray[Any], what: str) -> IntArray:
    """Return the indices in native byte order; raise unless they are distinct non-negative int64."""
    if ids.dtype == np.bool_:
        raise SubsetError(f"{what} is a boolean mask {ids.shape}, not indices: use np.flatnonzero(mask)")
    if ids.dtype.kind in "iuf" and ids.size > 2 and np.isin(ids, (0, 1)).all():
        raise SubsetError(f"{what} holds only 0 and 1, so it is a mask, not indices: use np.flatnonzero(mask)")
    if ids.dtype.newbyteorder("=") == np.int64:
        ids = ids.astype(np.int64, copy=False)  # big-endian files
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise SubsetError(
            f"{what} is {ids.dtype} {ids.shape}: must be one-dimensional int64; use ids.ravel().astype(np.int64)"
        )
    if not len(ids):
        raise SubsetError(f"{what} is empty: keep at least one sample")
    if ids.min() < 0:
        raise SubsetError(f"{what} has negative indices, such as {ids.min()}: count from 0, the first sample")
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        raise SubsetError(
            f"{what} repeats {len(ids) - len(values)} indices, such as {values[counts.argmax()]}: use np.unique(ids)"
        )
    return ids


def _check_range(ids: IntArray, what: str, n: int) -> None:
    if ids.max() >= n:
        raise SubsetError(
            f"{what} has indices past the end, such as {ids.max()}: the data has {n} training samples, 0 to {n - 1}"
        )


def _read_provenance(file: Path, ids: IntArray) -> dict[str, Any] | None:
    beside = file.with_suffix(".json")
    if not beside.exists():
        return None
    advice = "rename it if kdfast did not write it, or prune again"
    provenance: dict[str, Any] = read_json(beside, schemas.Provenance, error=SubsetError, advice=advice)
    if provenance["ids"] != _digest(ids):
        raise SubsetError(
            f"{beside} describes other indices than those in {file.name}: remove it if you changed them on purpose, or "
            "remove both and prune again"
        )
    if not matches_seal(provenance):
        raise SubsetError(f"{beside} was damaged or edited, it does not match its own digest: prune again")
    return without_seal(provenance)


def _check_replaceable(file: Path) -> None:
    """Check that a subset file and its provenance may be written, while no other process writes there."""
    beside = file.with_suffix(".json")
    check_replaceable(beside, _is_own_provenance)
    check_replaceable(file, lambda _: _is_own_subset(file, beside))


def _is_own_subset(file: Path, beside: Path) -> bool:
    try:
        return bool(_digest(_check_ids(_load(file), str(file))) == read_json(beside, schemas.Provenance)["ids"])
    except (DataError, SubsetError):
        return False


def _is_own_provenance(path: Path) -> bool:
    try:
        return bool(read_json(path, schemas.Provenance))
    except DataError:
        return False


def _digest(ids: IntArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()
