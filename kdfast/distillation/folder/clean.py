"""Delete what a finished run does not need."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from kdfast.distillation.folder.content import CHECKPOINTS, checkpoint_files, is_run_config, read_finished_run
from kdfast.errors import DataError, OutputError
from kdfast.files import FolderLock, remove_stale


@dataclass(frozen=True)
class Cleaned:
    """What `clean_run` deleted: the number of files, and their bytes."""

    files: int
    bytes: int


def clean_run(path: Path, *, force: bool = False) -> Cleaned:
    """Delete the checkpoints of a finished run, and files that killed processes left behind.

    Args:
        path: The run's folder.
        force: Also delete the checkpoints of a run that is not finished, which then starts over.

    Raises:
        DataError: The folder holds no run, or its result is damaged.
        CheckpointError: The student is damaged, which the checkpoints could write anew.
        OutputError: The run is not finished and `force` is not set, or another process uses the folder.
    """
    if not path.is_dir() or not is_run_config(path / "config.json"):
        raise DataError(f"{path} holds no run: pass the folder that a training run wrote")
    with FolderLock(path):
        if not force and read_finished_run(path) is None:
            raise OutputError(
                f"{path} holds a run that is not finished, and without its checkpoints it starts over: finish it, or "
                "pass `force`"
            )
        before = _own_files(path)
        for file in checkpoint_files(path):
            file.unlink()
        remove_stale(path)
        remove_stale(path / CHECKPOINTS)
        with contextlib.suppress(OSError):  # files of others are in it
            (path / CHECKPOINTS).rmdir()
        deleted = [size for file, size in before.items() if not file.exists()]
        return Cleaned(len(deleted), sum(deleted))


def _own_files(path: Path) -> dict[Path, int]:
    """Return the bytes of each file of a run's folder and of its checkpoints."""
    places = (path, path / CHECKPOINTS)
    return {file: file.lstat().st_size for place in places if place.is_dir() for file in place.iterdir()}
