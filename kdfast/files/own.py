"""Files and folders inside an output folder that someone else may have prepared.

Such a folder may hold symbolic links to anything that the user can write. What is opened for writing, appending or
locking there is therefore a regular file, and what is created in is a folder, of the output folder itself.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from kdfast.errors import OutputError
from kdfast.files.atomic import make_write_error

# O_NONBLOCK: a pipe would block until it has a reader.
_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


def open_own(path: str | os.PathLike[str]) -> int:
    """Open a file for reading and writing, and create it if it is missing; an existing one is not truncated.

    Args:
        path: The file. Its folder must exist.

    Returns:
        The descriptor, at the start of the file.

    Raises:
        OutputError: The path is a symbolic link or no regular file, or cannot be opened.
    """
    try:
        descriptor = os.open(path, _FLAGS, 0o666)
    except OSError as exc:
        if exc.errno == errno.ELOOP:
            raise _link_error(Path(path)) from exc
        raise make_write_error(Path(path), exc) from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutputError(f"{path} is no regular file, so kdfast did not write it: delete it, or use another folder")
    return descriptor


def refuse_links(folder: str | os.PathLike[str], *names: str) -> Path:
    """Check that nested folders, of which the last ones may be missing, do not lead out of an output folder.

    Args:
        folder: The output folder; it may be a link itself.
        names: Names of the nested folders, from the outermost.

    Returns:
        The path of the innermost.

    Raises:
        OutputError: One of them is a symbolic link.
    """
    path = Path(folder)
    for name in names:
        path = path / name
        if path.is_symlink():
            raise _link_error(path)
    return path


def is_plain_name(name: object) -> bool:
    """Return whether a value read from a file is the name of an entry of a folder, rather than a path."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}


def _link_error(path: Path) -> OutputError:
    return OutputError(
        f"{path} is a symbolic link, and writing there could change files outside of its folder: delete the link, or "
        "use another folder"
    )
