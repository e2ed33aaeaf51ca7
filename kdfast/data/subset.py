"""Subset files: which training samples to keep.

`idx.npy` is a one-dimensional int64 array of original training indices, in any order; np.save makes one. Where kdfast
wrote it, `idx.json` beside it says of which data and how. What would train on the wrong samples is refused.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

import kdfast
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError, OutputError, SubsetError, UsageError
from kdfast.files import atomic_write, check_writable, read_json, write_json


@dataclass(frozen=True)
class Subset:
    """The samples to keep.

    Attributes:
        ids: `(k,)` int64 original training indices, without repetition, in the file's order.
        provenance: What `idx.json` says, or None without one.
        path: The file they came from, or None.
    """

    ids: IntArray
    provenance: dict[str, Any] | None
    path: Path | None


def read_subset(
    path: str | os.PathLike[str], *, n: int, fingerprint: str | None = None, batch_size: int | None = None
) -> Subset:
    """Read a subset file and check that it fits.

    Args:
        path: The .npy file.
        n: Number of training samples of the data it is to be used with.
        fingerprint: Of that data; compared where `idx.json` lies beside the file. None: not compared.
        batch_size: The subset must fill at least one batch of this size. None: not checked.

    Raises:
        SubsetError: The file is missing, damaged, no plain int64 vector, empty, has repeated or foreign indices, fills
            no batch, or belongs to other data.
    """
    file = Path(path)
    ids = _check_ids(_load(file), str(file))
    provenance = _read_provenance(file, ids)
    if provenance is not None and fingerprint is not None and provenance["data"] != fingerprint:
        raise SubsetError(
            f"{file} was made of other data (fingerprint {provenance['data'][:12]}; this data has {fingerprint[:12]}): "
            "its indices mean other samples; prune this data anew"
        )
    _check_range(ids, str(file), n)
    if batch_size is not None and len(ids) < batch_size:
        raise SubsetError(
            f"{file} keeps {len(ids)} samples, fewer than one batch of {batch_size}: keep more or lower the batch size"
        )
    return Subset(ids, provenance, file)


def check_subset_file(path: str | os.PathLike[str]) -> None:
    """Refuse what `read_subset` would refuse whatever data it is for: quickly, before that data is opened.

    Raises:
        SubsetError: The file is missing, damaged, no plain int64 vector, empty, or has repeated or negative indices.
    """
    _check_ids(_load(Path(path)), str(path))


def check_subset_path(path: str | os.PathLike[str]) -> None:
    """Refuse a place where `write_subset` would refuse to write, before the work that leads to the subset.

    Nothing is written, and the folder may still be missing.

    Args:
        path: The .npy file to be written.

    Raises:
        UsageError: `path` does not end in .npy.
        OutputError: The file there is of other making, or the .json beside it is not kdfast's.
    """
    file = Path(path)
    if file.suffix != ".npy":
        raise UsageError(f"{file}: a subset file is named .npy; give such a name")
    beside = file.with_suffix(".json")
    if not beside.exists():
        if file.exists():
            raise OutputError(f"{file} is there already and kdfast did not write it; give another name, or delete it")
        return
    try:
        ours = _is_provenance(read_json(beside))
    except DataError:
        ours = False
    if not ours:
        raise OutputError(f"{beside} is no provenance that kdfast wrote and would be replaced; give another name")


def write_subset(path: str | os.PathLike[str], ids: npt.NDArray[Any], provenance: Mapping[str, Any]) -> None:
    """Write a subset file and its provenance beside it, each atomically.

    Args:
        path: The .npy file to write; the provenance goes to the same name with .json. The folder is made when missing.
        ids: `(k,)` int64 original training indices, in any order.
        provenance: JSON values; "data" must be the data's fingerprint. By custom also method, parameters, seed, scores
            (fingerprint of the scores) and seconds. A digest of the ids and the version of kdfast are added.

    Raises:
        SubsetError: The ids are no subset, or the fingerprint is missing.
        UsageError: `path` does not end in .npy.
        OutputError: A file cannot be written, or what is there is of other making.
    """
    file = Path(path)
    check_subset_path(file)
    if not isinstance(provenance.get("data"), str):
        raise SubsetError(f"provenance with {sorted(provenance)}: needs 'data', the fingerprint of the data")
    checked = _check_ids(ids, "the subset to write")
    check_writable(file.parent)
    # The provenance first: should the second write not come about, its digest gives the old ids away.
    write_json(file.with_suffix(".json"), {**provenance, "ids": _digest(checked), "kdfast": kdfast.__version__})
    with atomic_write(file) as stream:
        np.save(stream, checked, allow_pickle=False)


def subset_size(n: int, fraction: float) -> int:
    """Number of samples that a fraction keeps: `round(fraction * n)`, halves to the even number.

    Args:
        n: Number of training samples.
        fraction: In (0, 1].

    Raises:
        SubsetError: The fraction is out of range or keeps nothing.
    """
    if not 0 < fraction <= 1:
        raise SubsetError(f"fraction {fraction}: must be above 0 and at most 1")
    size = round(fraction * n)
    if size < 1:
        raise SubsetError(f"fraction {fraction} of {n} samples keeps none: give a larger one")
    return size


def class_budgets(labels: IntArray, total: int, mode: Literal["proportional", "equal"] = "proportional") -> IntArray:
    """How many samples of each class to keep, `total` together.

    "proportional": the class's share of the data, by largest remainder. "equal": the same of each class, up to one when
    the classes do not divide `total`. Ties go to the lower label.

    Args:
        labels: `(n,)` int64 from 0; the classes are 0 to the largest label.
        total: Samples to keep, in `[1, n]`.
        mode: "proportional" or "equal".

    Returns:
        `(classes,)` int64.

    Raises:
        SubsetError: `total` is out of range, a class would lose all its samples, or, for "equal", has too few.
    """
    if not 1 <= total <= len(labels):
        raise SubsetError(f"{total} samples to keep of {len(labels)}: must be in 1..{len(labels)}")
    if mode not in ("proportional", "equal"):
        raise SubsetError(f"class budgets {mode!r}: must be 'proportional' or 'equal'")
    sizes = np.bincount(labels).astype(np.int64)
    if mode == "equal":
        floor, remainder = np.full_like(sizes, total // len(sizes)), np.zeros_like(sizes)
    else:
        floor, remainder = np.divmod(total * sizes, len(labels))
    budgets = floor
    budgets[np.argsort(-remainder, kind="stable")[: total - int(floor.sum())]] += 1
    short = np.flatnonzero(budgets > sizes)
    if len(short):
        raise SubsetError(
            f"class {short[0]} has {sizes[short[0]]} samples and equal budgets need {budgets[short[0]]} "
            f"({len(short)} such classes): keep fewer samples, or use proportional budgets"
        )
    empty = np.flatnonzero((budgets == 0) & (sizes > 0))
    if len(empty):
        advice = "keep more" if mode == "equal" else "keep more, or use equal budgets"
        raise SubsetError(
            f"keeping {total} of {len(labels)} samples leaves {len(empty)} classes empty, the first is {empty[0]} with "
            f"{sizes[empty[0]]} samples: {advice}"
        )
    return budgets


def _load(file: Path) -> npt.NDArray[Any]:
    try:
        array = np.load(file, allow_pickle=False)
    except OSError as exc:
        raise SubsetError(f"cannot read {file}: {exc.strerror or exc}") from exc
    except (ValueError, EOFError, MemoryError) as exc:
        raise SubsetError(
            f"{file} is truncated or not a plain .npy array (pickles are not read): save it with np.save(path, ids)"
        ) from exc
    if not isinstance(array, np.ndarray):
        array.close()
        raise SubsetError(f"{file} is an .npz archive: save the indices alone with np.save(path, ids)")
    return array


def _check_ids(ids: npt.NDArray[Any], what: str) -> IntArray:
    """The indices in this machine's byte order; refuses anything but distinct int64 from 0 on."""
    if ids.dtype == np.bool_:
        raise SubsetError(f"{what} is a boolean mask {ids.shape}, not indices: save np.flatnonzero(mask) instead")
    if ids.dtype.newbyteorder("=") == np.int64:
        ids = ids.astype(np.int64, copy=False)  # big-endian files
    if ids.ndim != 1 or ids.dtype != np.int64:
        raise SubsetError(
            f"{what} is {ids.dtype} {ids.shape}: needs a one-dimensional int64 array; use ids.ravel().astype(np.int64)"
        )
    if not len(ids):
        raise SubsetError(f"{what} is empty: keep at least one sample")
    if ids.min() < 0:
        raise SubsetError(f"{what} has negative indices, such as {ids.min()}: count from 0, at the front of the data")
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
    provenance: dict[str, Any] = read_json(beside, error=SubsetError)
    if not _is_provenance(provenance):
        raise SubsetError(f"{beside} is no provenance that kdfast wrote: rename it, or prune anew")
    if provenance["ids"] != _digest(ids):
        raise SubsetError(
            f"{beside} describes other indices than {file.name} holds: remove it if you changed them on purpose, else "
            "prune anew"
        )
    return provenance


def _is_provenance(content: object) -> bool:
    return isinstance(content, dict) and isinstance(content.get("data"), str) and "ids" in content


def _digest(ids: IntArray) -> str:
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()
