"""Locks of what several processes and machines make and use together in the folder of a study."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from kdfast.files import make_subfolder, open_own

LOCKS = ".locks"


@contextlib.contextmanager
def hold(folder: Path, name: str, *, shared: bool = False) -> Iterator[bool]:
    """Try to lock an artefact; yield whether the lock is held, which ends with the block or the process.

    Args:
        folder: Folder of the study.
        name: Name of the artefact, a path within the folder.
        shared: Whether other processes may hold it too, if they share it: to use the artefact, not to make or delete
            it.

    Raises:
        OutputError: The lock file cannot be written.
    """
    path = make_subfolder(folder, LOCKS) / f"{name.replace('/', '-')}.lock"
    descriptor = open_own(path)
    try:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        yield held
    finally:
        os.close(descriptor)
