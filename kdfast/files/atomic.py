"""Atomic writes: a file is either complete or absent.

A write goes to a temporary file in the folder of the target, is flushed to disk, and is then renamed to the target.
Neither a full disk nor a killed process leaves a partial file under the final name. The writer holds a lock on its
temporary file, which is released when the process exits, so the next writer can distinguish the files of a killed
writer from those of a running one and remove them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from kdfast.errors import KdfastError, OutputError

# The random part precedes the target's name, because np.save and others inspect the suffix.
_PREFIX = ".kdtmp-"
_RANDOM_BYTES = 6
# Bytes of the target's name in the temporary one, which must not exceed 255 bytes; its end, with the suffix.
_NAME_BYTES = 200
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `path` if the body ends without an exception.

    The temporary file exists (empty), lies in the folder of `path` and ends with its name, so that writers that depend
    on the suffix work. After an exception it is removed, and an existing file at `path` is unchanged.

    Args:
        path: The file to write. Its folder must exist; an existing file is replaced.

    Yields:
        The path of the temporary file.

    Raises:
        OutputError: The file cannot be written: missing or read-only folder, full disk, `path` is a folder.
    """
    target = Path(path)
    temporary, descriptor = open_temporary(target)
    try:
        try:
            yield temporary
            _publish(temporary, target)
        except Exception as exc:
            reason = _disk_error(exc, (str(target), str(temporary)), descriptor)
            if reason is None:
                raise
            raise make_write_error(target, reason) from exc
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


def remove_stale(folder: str | os.PathLike[str]) -> None:
    """Remove the temporary files that killed writers left in a folder; those of running writers stay."""
    path = Path(folder)
    if path.is_dir():
        _remove_unlocked(path, lambda name: name.startswith(_PREFIX))


def open_temporary(target: Path) -> tuple[Path, int]:
    """Create an empty, locked file beside `target`, after removing those of killed writers of the same target.

    Returns:
        Its path and its open descriptor, which holds the lock.

    Raises:
        OutputError: The file cannot be created, or `target` is a folder.
    """
    if os.path.isdir(target):
        raise make_write_error(target, "it is a folder")
    try:
        with contextlib.suppress(FileNotFoundError):
            target.lstat()  # a name that is too long fails here, before the work
        _remove_stale_of(target)
        while True:
            temporary = target.parent / f"{_PREFIX}{secrets.token_hex(_RANDOM_BYTES)}-{_shortened(target.name)}"
            descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            # Some network file systems have no locks. There no file is ever considered stale, which costs disk space.
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:
                return temporary, descriptor
            os.close(descriptor)  # another writer removed the file between its creation and its lock
    except OSError as exc:
        raise make_write_error(target, exc) from exc


def make_write_error(path: Path, reason: OSError | str) -> OutputError:
    """Return the OutputError for a path that cannot be written."""
    text = reason if isinstance(reason, str) else reason.strerror or str(reason)
    return OutputError(f"cannot write {path}: {text}; free space, repair the folder, or use another path")


def _remove_stale_of(target: Path) -> None:
    """Remove the temporary files of `target` that no running process has locked."""
    ending, length = _shortened(target.name), len(_PREFIX) + 2 * _RANDOM_BYTES + 1  # hexadecimal digits and a dash
    _remove_unlocked(target.parent, lambda name: name.startswith(_PREFIX) and name[length:] == ending)


def _shortened(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[-_NAME_BYTES:])


def _remove_unlocked(folder: Path, matches: Callable[[str], bool]) -> None:
    for entry in os.scandir(folder):
        if not matches(entry.name):
            continue
        with contextlib.suppress(OSError):
            descriptor = os.open(entry.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(entry.path)
            finally:
                os.close(descriptor)


def _publish(temporary: Path, target: Path) -> None:
    """Flush the file, rename it, and flush the folder's new entry."""
    _fsync(temporary, os.O_RDONLY)
    os.replace(temporary, target)
    _fsync(target.parent, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as exc:
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system cannot flush this kind of file
            raise
    finally:
        os.close(descriptor)


def _disk_error(exc: Exception, names: tuple[str, str], descriptor: int) -> str | None:
    """Return why writing failed, or None if `exc` is an error of the body itself."""
    if isinstance(exc, KdfastError):
        return None
    link: BaseException | None = exc
    while link is not None:  # torch.save hides the OSError behind a RuntimeError
        if isinstance(link, OSError) and (link.filename in names or (not link.filename and link.errno in _DISK_ERRORS)):
            return link.strerror or str(link)
        for reason in map(os.strerror, _DISK_ERRORS):  # compiled writers (safetensors) raise errors of their own types
            if reason in str(link):
                return reason
        link = link.__cause__ or link.__context__
    # np.save loses the error number, so test whether the file accepts more bytes.
    try:
        written = os.pwrite(descriptor, bytes(4096), os.fstat(descriptor).st_size)
    except OSError as fault:
        return fault.strerror or str(fault)
    return None if written == 4096 else os.strerror(errno.ENOSPC)
