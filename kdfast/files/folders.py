"""Output folders: check that they are writable, list them, and lock them for one process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
from pathlib import Path
from types import TracebackType

from kdfast.errors import OutputError
from kdfast.files.atomic import make_write_error, open_temporary
from kdfast.files.own import open_own, refuse_links

_LOCK_NAME = ".kdfast.lock"
_HOLDER = re.compile(rb"(process [0-9]+ on \S*)?")  # the content of a lock file
_HOLDER_BYTES = 300
_LOCKED = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Create `folder` and its parents, and check that a file can be written there.

    Call it before long-running work that writes its result there.

    Returns:
        `folder` as a Path.

    Raises:
        OutputError: The folder cannot be created, or no file can be written to it.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise make_write_error(path, exc) from exc
    probe, descriptor = open_temporary(path / "probe")
    try:
        # More than an inode can hold inline, and flushed, so that a full disk fails here.
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)
    except OSError as exc:
        raise make_write_error(path, exc) from exc
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            probe.unlink()
    return path


def make_subfolder(folder: str | os.PathLike[str], *names: str) -> Path:
    """Create nested folders in an output folder, and check that a file can be written to the innermost.

    Returns:
        The path of the innermost folder.

    Raises:
        OutputError: One of them is a symbolic link, cannot be created, or no file can be written there.
    """
    return check_writable(refuse_links(folder, *names))


def visible_entries(folder: str | os.PathLike[str]) -> list[str]:
    """List the names in a folder, sorted, without hidden files (locks, files of desktops and file systems).

    Hidden folders are listed.

    Returns:
        The names; empty if `folder` does not exist.

    Raises:
        OutputError: The folder cannot be listed, or is a file.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") or entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise make_write_error(Path(folder), exc) from exc


class FolderLock:
    """Lock an existing folder for this process while the `with` block runs; killing the process releases it.

    The lock is `flock` on a hidden file in the folder. The file stays: if it were removed, two processes could each
    lock a different file of the same name.

    Raises:
        OutputError: On entering, if another process (or another FolderLock of this process) holds the lock, the folder
            is not writable, or the file is a link or not a lock file.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        path = self.folder / _LOCK_NAME
        descriptor = open_own(path)
        if not _HOLDER.fullmatch(os.pread(descriptor, _HOLDER_BYTES, 0)):
            os.close(descriptor)
            raise OutputError(f"{path} is not a lock file of kdfast: move it away, or use another folder")
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        except OSError as exc:
            error = _make_lock_error(self.folder, descriptor, exc)
            os.close(descriptor)
            raise error from exc
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def check_unlocked(folder: str | os.PathLike[str]) -> None:
    """Check that no process holds a folder's lock. The folder may be read-only.

    Raises:
        OutputError: One does, or the lock cannot be read.
    """
    path = Path(folder)
    try:
        descriptor = os.open(path / _LOCK_NAME, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    except OSError as exc:
        raise OutputError(f"cannot read the lock of {path} ({exc.strerror}): allow it to be read") from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as exc:
        raise _make_lock_error(path, descriptor, exc) from exc
    finally:
        os.close(descriptor)


def _make_lock_error(folder: Path, descriptor: int, exc: OSError) -> OutputError:
    if exc.errno in _LOCKED:
        holder = os.pread(descriptor, _HOLDER_BYTES, 0).decode(errors="replace")
        return OutputError(
            f"{folder} is in use by {holder or 'another process'}: wait for it, stop it, or use another folder"
        )
    return OutputError(f"cannot lock {folder} ({exc.strerror or exc}): use a folder on a local disk")
