"""Locks of what several processes and machines build together in the folder of a study, each thing once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from kdfast.files import make_subfolder, open_own
from kdfast.progress import Progress
from kdfast.sweep.work import POLL_SECONDS

LOCKS = ".locks"


@contextlib.contextmanager
def building(folder: Path, name: str, progress: Progress | None) -> Iterator[None]:
    """Hold the lock of an artefact, after waiting for another process that does; a killed process releases it.

    Args:
        folder: Folder of the study.
        name: Name of the artefact, a path within the folder.
        progress: Called with (0, 1, note) while waiting.

    Raises:
        OutputError: The lock file cannot be written.
    """
    path = make_subfolder(folder, LOCKS) / f"{name.replace('/', '-')}.lock"
    descriptor = open_own(path)
    try:
        while not _try_lock(descriptor):
            if progress is not None:
                progress(0, 1, f"waits for another process that makes {name}")
            time.sleep(POLL_SECONDS)
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
