"""Disk space: refuse, before the work, what will not fit."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from kdfast.errors import OutputError

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def free_space(folder: str | os.PathLike[str]) -> int:
    """Return the bytes that can be written to a folder, which need not exist yet."""
    path = Path(os.path.abspath(folder))
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def used_space(folder: str | os.PathLike[str]) -> int:
    """Return the bytes of all files below a folder; 0 if it does not exist."""
    return sum(os.lstat(os.path.join(place, name)).st_size for place, _, names in os.walk(folder) for name in names)


def check_space(folder: str | os.PathLike[str], size: int, what: str) -> None:
    """Check that a folder has room for what is to be written, of which an earlier process may have written a part.

    Args:
        folder: The folder; need not exist.
        size: Bytes of all of it, at least roughly.
        what: What takes them, for the message.

    Raises:
        OutputError: There is less room.
    """
    free, needed = free_space(folder), size - used_space(folder)
    if needed > free:
        raise OutputError(
            f"{what} takes about {format_bytes(needed)}, and {folder} has {format_bytes(free)} free: free space, or "
            "write to another disk"
        )


def format_bytes(count: float) -> str:
    """Return a number of bytes with a decimal unit, such as `1.2 GB`."""
    for size, unit in _UNITS:
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} bytes"
