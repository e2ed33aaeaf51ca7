"""Open files that someone else may have written: regular files only, without waiting, and no larger than their kind.

Every limit on what is read is here. A pipe or a device is refused: a pipe without a writer would block forever, and a
device such as /dev/zero never ends.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

# Largest sizes in bytes. Files written by kdfast or by hand are far smaller.
MAX_CONFIG_BYTES = 64 << 10
MAX_JSON_BYTES = 256 << 20
MAX_TEXT_BYTES = 64 << 20
MAX_TABLE_BYTES = 1 << 30  # a line for each of many million samples
MAX_IMAGE_BYTES = 1 << 30
MAX_CIFAR_BYTES = 1 << 30  # of the archive, uncompressed; the official ones have 178 and 187 MB

# Largest number of pixels of an image, that of Pillow's own warning about decompression bombs.
MAX_IMAGE_PIXELS = (1 << 30) // 4 // 3

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_MEMORY_INFO = "/proc/meminfo"


def open_regular(path: str | os.PathLike[str], max_bytes: int | None = None) -> BinaryIO:
    """Open a regular file for reading.

    Args:
        path: The file.
        max_bytes: Largest allowed size. None: not limited.

    Raises:
        OSError: The file is missing, unreadable, too large, or a pipe, a device or a folder.
    """
    file = open(path, "rb", opener=_open_without_waiting)  # noqa: SIM115 - returned open
    try:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", os.fspath(path))
        if max_bytes is not None and status.st_size > max_bytes:
            raise OSError(errno.EFBIG, f"it has {status.st_size} bytes, the limit is {max_bytes}", os.fspath(path))
    except BaseException:
        file.close()
        raise
    return file


def read_bounded(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Read a regular file of at most `max_bytes`.

    Raises:
        OSError: The file is missing, unreadable, too large, or a pipe, a device or a folder.
    """
    with open_regular(path, max_bytes) as file:
        return file.read(max_bytes)  # the file may have grown


def total_memory() -> int:
    """Return the memory of the machine in bytes, or the container's limit if smaller."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _CGROUP_LIMITS:
        limit = Path(name)
        # Without a limit the file is missing or holds `max`.
        text = limit.read_text().strip() if limit.is_file() else ""
        if text.isdigit():
            memory = min(memory, int(text))
    return memory


def available_memory() -> int:
    """Return the memory in bytes that can be allocated without swapping, as far as the system tells."""
    available = total_memory()
    try:
        with open(_MEMORY_INFO) as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    available = min(available, int(line.split()[1]) * 1024)
    except (OSError, ValueError, IndexError):
        pass
    return available


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
