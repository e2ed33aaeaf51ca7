"""Digests and statistics of images on disk, remembered while the files are unchanged.

Decoding a folder to find its fingerprint takes longer than many commands. The result is kept in the user's cache folder
(`KDFAST_CACHE_DIR`, or `kdfast` in `XDG_CACHE_HOME`, which is `~/.cache` by default) under the stamp of the split: a
digest of path, size and times of every file, of the labels, and of how the files are decoded. What cannot be kept or
read is computed again.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from kdfast.errors import KdfastError
from kdfast.files.records import read_sealed, write_sealed

T = TypeVar("T", str, list[int])

_VERSION = 1  # of the decoding
_SETTLED_SECONDS = 1.0  # a file that changed later than this may change again within the clock's resolution


@runtime_checkable
class Stamped(Protocol):
    """A split of files, which can be recognized without reading them."""

    def stamp(self) -> str | None:
        """Return a digest of what its pixels and labels are made from, or None if it cannot be relied on."""


def combine_stamps(split: object, change: bytes) -> str | None:
    """Return the stamp of a split that is made from another one, or None if that has none.

    Args:
        split: The other split.
        change: What distinguishes the new one, such as its labels.
    """
    stamp = _stamp_of(split)
    return None if stamp is None else hashlib.sha256(stamp.encode() + change).hexdigest()


def stamp_files(files: Iterable[str], *how: object) -> str | None:
    """Return a stamp of files and of how they are read.

    Args:
        files: Their paths, in the order in which they are read.
        how: What else the pixels and labels depend on; bytes, or values whose text says all.

    Returns:
        SHA-256 in hexadecimal; None if a file is missing, or has changed within the last second.
    """
    digest = hashlib.sha256(f"kdfast {_VERSION}".encode())
    here, newest = os.getcwd().encode(), 0
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            return None
        newest = max(newest, status.st_mtime_ns, status.st_ctime_ns)
        path = os.path.join(here, os.fsencode(file))
        digest.update(b"%b\0%d %d %d\n" % (path, status.st_size, status.st_mtime_ns, status.st_ctime_ns))
    for item in how:
        content = item if isinstance(item, bytes) else repr(item).encode()
        digest.update(b"%d " % len(content) + content)
    return digest.hexdigest() if newest < (time.time() - _SETTLED_SECONDS) * 1e9 else None


def remembered(split: object, name: str, compute: Callable[[], T]) -> T:
    """Return a value that depends only on a split, computed at most once for unchanged files.

    Args:
        split: The split.
        name: Name of the value.
        compute: Computes it.
    """
    stamp = _stamp_of(split)
    file = None if stamp is None else _folder() / f"{stamp}.json"
    known = {} if file is None else _read(file)
    if name in known:
        return cast(T, known[name])
    value = compute()
    if file is not None:
        _write(file, {**_read(file), name: value})
    return value


def is_remembered(split: object, name: str) -> bool:
    """Return whether `remembered` knows the value, so that nothing would be computed."""
    stamp = _stamp_of(split)
    return stamp is not None and name in _read(_folder() / f"{stamp}.json")


def _stamp_of(split: object) -> str | None:
    return split.stamp() if isinstance(split, Stamped) else None


def _folder() -> Path:
    own = os.environ.get("KDFAST_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "kdfast"


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(read_sealed(file))
    except (OSError, ValueError, KdfastError):
        return {}


def _write(file: Path, record: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(file, record)
    except (OSError, KdfastError):
        pass  # the next command computes the value again
