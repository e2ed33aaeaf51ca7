"""Files that are there whole or not at all: atomic writes, folder locks, digests.

A write goes to a temporary file in the target's own folder, is flushed to the disk and then renamed over the target, so
a reader, a full disk or a killed process never leaves half a file under the final name. The writer holds a lock on its
temporary file; the lock dies with the process, so the next writer of the same target tells the remains of a killed
run from the work of a living one and removes them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, NoReturn

from kdfast.errors import DataError, KdfastError, OutputError

# The random part comes before the target's name: np.save and others look at how a name ends.
_TEMPORARY = ".kdtmp-"
_LOCK_NAME = ".kdfast.lock"
_HELD = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)
_CHUNK = 1 << 20


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the body a temporary path to write, and rename it to `path` once the body has ended without an exception.

    The temporary file exists (empty), lies in the folder of `path` and ends with its name, so writers that go by the
    suffix work. After an exception it is removed and whatever was at `path` is untouched.

    Args:
        path: The file to write. Its folder must exist; an existing file is replaced.

    Yields:
        The path of the temporary file.

    Raises:
        OutputError: The file cannot be written: missing or read-only folder, full disk, `path` is a folder.
    """
    target = Path(path)
    temporary, descriptor = _open_temporary(target)
    try:
        try:
            yield temporary
            _publish(temporary, target)
        except Exception as exc:
            reason = _write_fault(exc, (str(target), str(temporary)), descriptor)
            if reason is None:
                raise
            raise OutputError(_cannot_write(target, reason)) from exc
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Like `atomic_path`, with the temporary file opened for binary writing.

        with atomic_write("idx.npy") as file:
            np.save(file, ids)

    Args:
        path: The file to write. Its folder must exist; an existing file is replaced.

    Yields:
        A buffered, seekable binary file.

    Raises:
        OutputError: The file cannot be written: missing or read-only folder, full disk, `path` is a folder.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, atomically. NaN and infinity, which JSON has not, are a ValueError.

    Raises:
        OutputError: The file cannot be written.
    """
    text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as file:
        file.write(text.encode() + b"\n")


def read_json(path: str | os.PathLike[str], *, error: type[KdfastError] = DataError) -> Any:
    """Read a JSON file.

    Args:
        path: The file.
        error: The kind of error to raise, for callers whose file is a cache's or a checkpoint's.

    Raises:
        KdfastError: Of kind `error`: the file is missing, unreadable, or not JSON.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror or exc}") from exc
    except ValueError as exc:  # JSONDecodeError and UnicodeDecodeError
        raise error(f"{path} is not valid JSON ({exc}): it is damaged or no kdfast file; write it anew") from exc


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal.

    Raises:
        DataError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror or exc}") from exc
    return digest.hexdigest()


def check_writable(folder: str | os.PathLike[str]) -> Path:
    """Make `folder` (with its parents) and prove that it takes a file, before hours of work whose result goes there.

    Returns:
        `folder` as a Path.

    Raises:
        OutputError: The folder cannot be made or takes no file.
    """
    place = Path(folder)
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(_cannot_write(place, exc.strerror or str(exc))) from exc
    probe, descriptor = _open_temporary(place / "probe")
    try:
        # More than an inode can hold inline, and flushed: a full disk refuses it now.
        os.write(descriptor, bytes(4096))
        os.fsync(descriptor)
    except OSError as exc:
        raise OutputError(_cannot_write(place, exc.strerror or str(exc))) from exc
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            probe.unlink()
    return place


def visible_entries(folder: str | os.PathLike[str]) -> list[str]:
    """Names of what a folder holds, sorted, without hidden files: locks, and what desktops and file systems leave.

    Returns:
        The names; none where nothing is at `folder`.

    Raises:
        OutputError: The folder cannot be listed, or is a file.
    """
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if not entry.name.startswith(".") or entry.is_dir())
    except FileNotFoundError:
        return []
    except OSError as exc:
        raise OutputError(_cannot_write(Path(folder), exc.strerror or str(exc))) from exc


class FolderLock:
    """Exclusive use of an existing folder while the `with` block runs; a killed process gives it up at once.

    The lock is `flock` on a hidden file in the folder. That file stays behind on purpose: removing it would let two
    processes each hold a lock on a different file of that name.

    Raises:
        OutputError: On entering: another process (or another FolderLock of this one) holds the folder, or it is not
            writable.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        self._descriptor: int | None = None

    def __enter__(self) -> FolderLock:
        path = self.folder / _LOCK_NAME
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as exc:
            raise OutputError(_cannot_write(path, exc.strerror or str(exc))) from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}".encode(), 0)
        except OSError as exc:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace") if exc.errno in _HELD else ""
            os.close(descriptor)
            self._refuse(exc, holder)
        self._descriptor = descriptor
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def _refuse(self, exc: OSError, holder: str) -> NoReturn:
        if exc.errno in _HELD:
            raise OutputError(
                f"{self.folder} is in use by {holder or 'another process'}: wait for it, stop it or take another folder"
            ) from exc
        raise OutputError(f"cannot lock {self.folder} ({exc.strerror or exc}): give a folder on a local disk") from exc


def _open_temporary(target: Path) -> tuple[Path, int]:
    """A new, empty, locked file beside `target`; remains of killed writers of the same target are removed first."""
    if target.is_dir():
        raise OutputError(_cannot_write(target, "it is a folder"))
    try:
        _remove_stale(target)
        while True:
            temporary = target.parent / f"{_TEMPORARY}{secrets.token_hex(6)}-{target.name}"
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            # Without locks (some network file systems) nothing is ever judged stale, so nothing is lost but disk space.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return temporary, descriptor
            os.close(descriptor)  # another writer's cleaning came between creation and lock
    except OSError as exc:
        raise OutputError(_cannot_write(target, exc.strerror or str(exc))) from exc


def remove_stale(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writers left in a folder; those of living writers stay."""
    place = Path(folder)
    if place.is_dir():
        _remove_unheld(place, lambda name: name.startswith(_TEMPORARY))


def _remove_stale(target: Path) -> None:
    """Remove the temporary files of `target` that no living process holds."""
    length = len(_TEMPORARY) + 13  # 12 hexadecimal digits and a dash
    _remove_unheld(target.parent, lambda name: name.startswith(_TEMPORARY) and name[length:] == target.name)


def _remove_unheld(folder: Path, mine: Callable[[str], bool]) -> None:
    for entry in os.scandir(folder):
        if not mine(entry.name):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)
            finally:
                os.close(descriptor)


def _publish(temporary: Path, target: Path) -> None:
    """Bring the file's bytes to the disk, rename it, and bring the folder's new entry to the disk."""
    _fsync(temporary, os.O_RDONLY)
    os.replace(temporary, target)
    _fsync(target.parent, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot flush this kind of file
            raise
    finally:
        os.close(descriptor)


def _write_fault(exc: Exception, names: tuple[str, str], descriptor: int) -> str | None:
    """Why writing failed, or None when `exc` is an error of the body's own."""
    if isinstance(exc, KdfastError):
        return None
    link: BaseException | None = exc
    while link is not None:  # torch.save hides the OSError behind a RuntimeError
        if isinstance(link, OSError) and (link.filename in names or (not link.filename and link.errno in _NO_ROOM)):
            return link.strerror or str(link)
        for reason in map(os.strerror, _NO_ROOM):  # compiled writers (safetensors) raise kinds of their own
            if reason in str(link):
                return reason
        link = link.__cause__ or link.__context__
    # np.save loses the error number: ask the file itself whether it takes more bytes.
    try:
        written = os.pwrite(descriptor, bytes(4096), os.fstat(descriptor).st_size)
    except OSError as fault:
        return fault.strerror or str(fault)
    return None if written == 4096 else os.strerror(errno.ENOSPC)


def _cannot_write(path: Path, reason: str) -> str:
    return f"cannot write {path}: {reason}; free space, repair the folder, or give another path"
