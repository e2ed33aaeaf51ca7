"""The rule for output files: an existing file is replaced only if kdfast wrote it."""

from __future__ import annotations

import fnmatch
import os
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path

from kdfast.errors import OutputError
from kdfast.files.atomic import make_write_error
from kdfast.files.folders import FolderLock, visible_entries
from kdfast.files.own import refuse_links


def delete_own(folder: str | os.PathLike[str], patterns: Sequence[str]) -> None:
    """Delete what kdfast wrote to an output folder, while no other process uses it.

    Args:
        folder: The folder; may be missing.
        patterns: Patterns of the names that kdfast writes there.

    Raises:
        OutputError: The folder holds anything else, or a link, or another process uses it; nothing is deleted.
    """
    if not os.path.isdir(folder):
        return
    with FolderLock(folder):
        names = {name for name in os.listdir(folder) if any(fnmatch.fnmatchcase(name, one) for one in patterns)}
        others = [name for name in visible_entries(folder) if name not in names]
        if others:
            raise OutputError(
                f"{folder} also holds {others[0]}, which kdfast did not write: move it away, or use another folder"
            )
        for path in [refuse_links(folder, name) for name in sorted(names)]:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def check_replaceable(path: str | os.PathLike[str], is_own: Callable[[Path], bool]) -> None:
    """Check, before the work, that a file may be written: there is none, or kdfast wrote it. Writes nothing.

    Args:
        path: The file to write.
        is_own: Returns whether kdfast wrote a regular file; must not raise for any content.

    Raises:
        OutputError: The path is a folder, or there is something that kdfast did not write.
    """
    target = Path(path)
    try:
        if not os.path.lexists(target):
            return
        mode = target.stat().st_mode
    except OSError:  # a link to nothing, or a path that cannot be looked up
        mode = 0
    except ValueError as exc:  # a null byte
        raise make_write_error(target, str(exc)) from exc
    if stat.S_ISDIR(mode):
        raise make_write_error(target, "it is a folder")
    if not (stat.S_ISREG(mode) and is_own(target)):
        raise OutputError(f"{target} exists, and kdfast did not write it: use another name, or delete it")
