"""Subset files: the training samples to keep.

`idx.npy` is a one-dimensional int64 array of original training indices, in any order, as np.save writes it. If kdfast
wrote it, its provenance (the data and the method) is in `idx.json` beside it. Files of others hold indices of any
integer dtype, a boolean mask, or paths; `kdfast.data.subset.formats` reads them. Files that would train on the wrong
samples are rejected.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kdfast
from kdfast.data.source import Source, sample_files
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset.formats import load_subset
from kdfast.data.subset.ids import check_ids, check_range, mask_to_ids
from kdfast.data.subset.paths import SamplePaths
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
    path: str | os.PathLike[str],
    *,
    n: int,
    fingerprint: str | None = None,
    batch_size: int | None = None,
    files: Sequence[str] | None = None,
) -> Subset:
    """Read a subset file and check that it matches the data.

    Args:
        path: A .npy file of indices (any integer dtype) or of a boolean mask (n,); a .txt, .csv, .pt or .pickle file,
            see `kdfast.data.subset.formats.load_subset`.
        n: Number of training samples of the data.
        fingerprint: Fingerprint of the data, compared with the provenance if there is one. None: not compared.
        batch_size: The subset must fill at least one batch of this size. None: not checked.
        files: The path of each training sample, which paths in the file are compared with. None: the samples are no
            files.

    Raises:
        SubsetError: The file is missing, damaged, of another kind, empty, or may mean either of two subsets; it has
            repeated, unknown or out-of-range samples, fills no batch, or belongs to other data.
    """
    file = Path(path)
    ids = _read_ids(file, n, files)
    provenance = _read_provenance(file, ids)
    if provenance is not None and fingerprint is not None and provenance["data"] != fingerprint:
        raise SubsetError(
            f"{file} was made from other data (fingerprint {provenance['data'][:12]}; this data: {fingerprint[:12]}) "
            "and would select the wrong samples; prune this data again"
        )
    check_range(ids, str(file), n)
    if provenance is None:
        _check_is_no_ranking(ids, file, n)
    if batch_size is not None and len(ids) < batch_size:
        raise SubsetError(
            f"{file} keeps {len(ids)} samples, fewer than one batch of {batch_size}: keep more or lower `batch_size`"
        )
    return Subset(ids, provenance, file)


def open_subset(path: str | os.PathLike[str], source: Source, *, batch_size: int | None = None) -> Subset:
    """Read a subset file of a source's training split; arguments and errors as for `read_subset`."""
    return read_subset(
        path,
        n=len(source.train),
        fingerprint=source.fingerprint,
        batch_size=batch_size,
        files=sample_files(source.train),
    )


def check_subset_file(path: str | os.PathLike[str]) -> None:
    """Run the checks of `read_subset` that do not need the data, before the data is opened.

    Raises:
        SubsetError: The file is missing, damaged, of another kind, empty, or has repeated or negative indices.
    """
    content = load_subset(Path(path))
    if not isinstance(content, list) and content.dtype != np.bool_:
        check_ids(content, str(path))


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


def read_origin(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the provenance of a subset file that kdfast wrote, or None if there is no file.

    Raises:
        DataError: It is missing beside the file, or damaged.
    """
    file = Path(path)
    return dict(read_json(file.with_suffix(".json"), schemas.Provenance)) if file.exists() else None


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
    checked = check_ids(ids, "the subset to write")
    check_writable(file.parent)
    with _folder_for_one_writer(file.parent):
        _check_replaceable(file)
        # The old ids go first: beside the new provenance they would look like ids that someone changed.
        file.unlink(missing_ok=True)
        write_json(beside, seal({**provenance, "ids": digest_of(checked), "kdfast": kdfast.__version__}))
        with atomic_write(file) as stream:
            np.save(stream, checked, allow_pickle=False)


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


def _read_ids(file: Path, n: int, files: Sequence[str] | None) -> IntArray:
    content = load_subset(file)
    if isinstance(content, list):
        if files is None:
            raise SubsetError(
                f"{file} holds paths, such as {content[0][:200]}, and the samples of this data are not files: write "
                "indices, 0 for the first sample"
            )
        return check_ids(SamplePaths(files).find(content, str(file), SubsetError), str(file))
    if content.dtype == np.bool_:
        return mask_to_ids(content, str(file), n)
    return check_ids(content, str(file), n)


def _check_is_no_ranking(ids: IntArray, file: Path, n: int) -> None:
    """Refuse all samples in an order of their own where the name says that they are sorted by a score."""
    if "mask" in file.stem and len(ids) == n and (np.diff(ids) < 0).any():
        raise SubsetError(
            f"{file} holds all {n} samples in another order: it is a ranking by a score, as DUAL and TDDS write it, or "
            "the whole training split. To keep a part, pass it as `scores` to kdfast prune; for the whole split, omit "
            "it"
        )


def _read_provenance(file: Path, ids: IntArray) -> dict[str, Any] | None:
    beside = file.with_suffix(".json")
    if file.suffix != ".npy" or not beside.exists():
        return None
    advice = "rename it if kdfast did not write it, or prune again"
    provenance: dict[str, Any] = read_json(beside, schemas.Provenance, error=SubsetError, advice=advice)
    if provenance["ids"] != digest_of(ids):
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
        return bool(
            digest_of(check_ids(np.asarray(load_subset(file)), str(file)))
            == read_json(beside, schemas.Provenance)["ids"]
        )
    except (DataError, SubsetError):
        return False


def _is_own_provenance(path: Path) -> bool:
    try:
        return bool(read_json(path, schemas.Provenance))
    except DataError:
        return False


def digest_of(ids: IntArray) -> str:
    """Return the SHA-256 (hexadecimal) of sample indices in their order, as the provenance has it."""
    return hashlib.sha256(np.ascontiguousarray(ids, "<i8").tobytes()).hexdigest()
