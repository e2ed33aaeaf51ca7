"""`data.json`, the record of a conversion, and whether the .beton files still hold what was written.

The record holds the class names, the views, the fingerprint, and size and SHA-256 of both files, and is sealed by its
own digest. Opening a folder compares the content of the files with it. What was compared is remembered in
`.checked.json` beside the files: while size, times and inode of a file are the same, its content is not read again.

Version 1 recorded no digest of the files. Such a folder is verified once, by decoding its training split, and sealed.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from pathlib import Path
from typing import Any

from kdfast.data.ffcv.read import BetonSplit
from kdfast.data.source import compute_fingerprint
from kdfast.errors import DataError, OutputError
from kdfast.files import read_json, read_sealed, schemas, sha256_file, write_sealed
from kdfast.files.inputs import open_regular
from kdfast.files.validate import check_type

PARTS = ("train", "test")
RECORD = "data.json"
CHECKED = ".checked.json"
FORMAT = "kdfast betons 2"
UNSEALED = "kdfast betons 1"

_MARK = b"kdfast betons"
_MARK_WITHIN = 200  # bytes; the mark is in the first line of the record
_SETTLED_SECONDS = 0.1  # a file that changed later than this may change again within the clock's resolution
_CONVERT_AGAIN = "convert the data again with kdfast data convert"


def has_record(folder: Path) -> bool:
    """Return whether the folder has a record of a conversion, even damaged; other programs have a data.json too."""
    try:
        with open_regular(folder / RECORD) as file:
            return _MARK in file.read(_MARK_WITHIN)
    except (FileNotFoundError, IsADirectoryError):
        return False
    except OSError as error:
        raise DataError(f"cannot read {folder / RECORD}: {error.strerror or error}") from error


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a conversion; None without one.

    Raises:
        DataError: The record is damaged, was edited, or is of another version.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    record = read_json(path, advice=_CONVERT_AGAIN)
    form = record.get("format") if isinstance(record, dict) else None
    if form not in (FORMAT, UNSEALED):
        raise DataError(f"{path} is not a record of this version of kdfast data convert: {_CONVERT_AGAIN}")
    if form == UNSEALED:
        check_type(record, schemas.BetonRecord1, path, advice=_CONVERT_AGAIN)
        return dict(record)
    try:
        record = read_sealed(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is damaged or was edited, its seal does not match: {_CONVERT_AGAIN}") from error
    check_type(record, schemas.BetonRecord, path, advice=_CONVERT_AGAIN)
    return record


def write_record(folder: Path, record: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """Write a record with the sizes and digests of the files in the folder, and return it.

    Args:
        folder: The folder.
        record: The other fields.
        digests: SHA-256 of each file; empty while a conversion is under way.

    Raises:
        OutputError: The file cannot be written.
    """
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": sha} for name, sha in digests.items()}
    record = {"format": FORMAT, **{k: v for k, v in record.items() if k != "format"}, "files": files}
    write_sealed(folder / RECORD, record)
    return record


def check_files(folder: Path, record: dict[str, Any]) -> None:
    """Compare the files of a folder with its record.

    Raises:
        DataError: A file has changed since it was written.
    """
    known = _read_checked(folder)
    checked: dict[str, Any] = {}
    for name, written in record["files"].items():
        path = folder / name
        facts = {**_facts(path), "sha256": written["sha256"]}
        if known.get(name) != facts and (facts["bytes"] != written["bytes"] or sha256_file(path) != written["sha256"]):
            raise DataError(
                f"{path} does not hold what was written to it: it is damaged or was changed; {_CONVERT_AGAIN}"
            )
        if known.get(name) == facts or time.time() - facts["ctime_ns"] / 1e9 > _SETTLED_SECONDS:
            checked[name] = facts
    if checked != known:
        with contextlib.suppress(OutputError):  # a folder that cannot be written is checked every time
            write_sealed(folder / CHECKED, {"files": checked})


def seal_older(folder: Path, record: dict[str, Any], train: BetonSplit) -> dict[str, Any]:
    """Verify a folder of version 1 by its fingerprint, and replace its record with a sealed one.

    Its test split has no digest: its size and time of modification are compared, and a difference is a warning.

    Returns:
        The record of this version; written if the folder can be.

    Raises:
        DataError: The training split is not the one that was written.
    """
    found = compute_fingerprint(train, len(record["classes"]))
    if found != record["fingerprint"]:
        raise DataError(
            f"{folder / 'train.beton'} does not hold the training samples that were written to it (fingerprint "
            f"{found[:12]}, recorded {str(record['fingerprint'])[:12]}): it is damaged or was changed; {_CONVERT_AGAIN}"
        )
    test = folder / "test.beton"
    if record["files"].get(test.name) != file_marks(folder).get(test.name):
        warnings.warn(
            f"{test} was changed or copied since an earlier version of kdfast converted it without a digest; its "
            f"present content counts from now on: if it may be damaged, {_CONVERT_AGAIN}",
            stacklevel=2,
        )
    digests = {f"{part}.beton": sha256_file(folder / f"{part}.beton") for part in PARTS}
    with contextlib.suppress(OutputError):
        return write_record(folder, record, digests)
    return record


def file_marks(folder: Path) -> dict[str, list[int]]:
    """Return size in bytes and modification time in nanoseconds of the .beton files, as version 1 recorded them."""
    paths = [path for part in PARTS if (path := folder / f"{part}.beton").is_file()]
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in paths}


def _facts(path: Path) -> dict[str, Any]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    return {
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "ctime_ns": status.st_ctime_ns,
        "inode": status.st_ino,
    }


def _read_checked(folder: Path) -> dict[str, Any]:
    """Return what was compared before; nothing if that is unknown."""
    try:
        known = read_sealed(folder / CHECKED)
        check_type(known, schemas.CheckedFiles, folder / CHECKED)
    except (OSError, ValueError):
        return {}
    files: dict[str, Any] = known["files"]
    return files
