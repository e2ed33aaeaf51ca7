"""Folder of a run: config, metrics, status, result, checkpoints and student, each written atomically."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdfast import trackers
from kdfast.distillation.folder.content import (
    CHECKPOINTS,
    METADATA_KEY,
    POINTER,
    RESULT,
    RESUME,
    RUN_FILES,
    check_run_folder,
    checkpoint_files,
    read_finished_run,
)
from kdfast.errors import CheckpointError, DataError, UsageError
from kdfast.files import (
    FolderLock,
    atomic_write,
    check_writable,
    make_subfolder,
    read_json,
    refuse_links,
    remove_stale,
    schemas,
    seal,
    sha256_file,
    write_json,
)
from kdfast.nets.foreign import read_torch_file


class RunFolder:
    """Files of one training run; a context manager that locks the folder.

    config.json holds the resolved settings and fingerprints, metrics.jsonl one line per logged step (append-only, no
    step twice), status.json the current state, result.json the result, student.pt the weights, checkpoints/ the latest
    two training states.

    Args:
        path: The folder; created if missing.
        config: What determines the weights. A folder with a run of another config is rejected, unless that run has
            saved nothing yet.
        metadata: Values for config.json, which may change between start and resume: paths, device, versions.
        resume: `auto` resumes the run in the folder, if any; `never` requires a folder without a run; `overwrite`
            deletes the run in the folder.
        writes: False for processes of a run that only read the folder; their writes do nothing.

    Raises:
        UsageError: If the folder holds a run with other settings.
        OutputError: If the folder cannot be written, is in use by another process, holds files that no run wrote or
            links that lead out of it, or holds a run and `resume` is `never`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        metadata: Mapping[str, Any] | None = None,
        resume: str = "auto",
        writes: bool = True,
    ) -> None:
        if resume not in RESUME:
            raise UsageError(f"`resume` is {resume!r}: pass one of {', '.join(RESUME)}")
        self.path = Path(path)
        self.writes = writes
        self._lock = FolderLock(self.path)
        self._config = json.loads(json.dumps(config))
        self._metadata = dict(metadata or {})
        self.resume = resume

    def __enter__(self) -> RunFolder:
        if not self.writes:
            return self
        check_run_folder(self.path, self._config, self.resume)  # leave nothing in a foreign folder
        check_writable(self.path)
        self._lock.__enter__()
        try:
            self._claim()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        if self.writes and (self.path / RESULT).exists():
            with contextlib.suppress(OSError):  # it holds checkpoints that are to be kept
                (self.path / CHECKPOINTS).rmdir()
        self._lock.__exit__(None, None, None)

    def _claim(self) -> None:
        resumes = check_run_folder(self.path, self._config, self.resume)
        checkpoints = make_subfolder(self.path, CHECKPOINTS)  # whoever ran it may have removed it after its end
        remove_stale(self.path)
        remove_stale(checkpoints)
        if resumes:
            return
        for name in RUN_FILES if self.resume == "overwrite" else ("metrics.jsonl",):
            (self.path / name).unlink(missing_ok=True)
        if self.resume == "overwrite":
            self._delete_rest()
        write_json(self.path / "config.json", {**self._config, METADATA_KEY: self._metadata})

    def _delete_rest(self) -> None:
        """Delete what else the run before has written: saved states and what trackers keep of it."""
        self.delete_checkpoints()
        (self.path / trackers.STATE).unlink(missing_ok=True)
        shutil.rmtree(refuse_links(self.path, "tensorboard"), ignore_errors=True)

    def save_checkpoint(self, state: Mapping[str, Any], step: int) -> None:
        """Write the state after `step` steps to a new file, point latest.json to it, and keep the previous one."""
        if not self.writes:
            return
        folder = self.path / CHECKPOINTS
        pointer, file = folder / POINTER, folder / f"step-{step:09d}.pt"
        before = None
        if pointer.exists():
            before = {name: value for name, value in self._read_pointer(pointer).items() if name != "before"}
        with atomic_write(file) as temporary:
            torch.save(dict(state), temporary)
        write_json(pointer, {"file": file.name, "step": step, "sha256": sha256_file(file), "before": before})
        kept = {file.name} | ({before["file"]} if before else set())
        for name in os.listdir(folder):
            if name not in kept and re.fullmatch(schemas.CHECKPOINT_NAME, name):
                (folder / name).unlink()

    def delete_checkpoints(self) -> None:
        """Delete all saved states, which a finished run does not need."""
        if self.writes:
            for file in checkpoint_files(self.path):
                file.unlink()

    @property
    def has_checkpoint(self) -> bool:
        """Whether a state was saved."""
        return (self.path / CHECKPOINTS / POINTER).exists()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Load the latest intact state; None if none was saved.

        Raises:
            CheckpointError: If the last two files are damaged or missing.
        """
        if not self.has_checkpoint:
            return None
        pointer = self.path / CHECKPOINTS / POINTER
        latest = self._read_pointer(pointer)
        for entry in filter(None, (latest, latest.get("before"))):
            file = pointer.parent / entry["file"]
            if file.exists() and sha256_file(file) == entry["sha256"]:
                state: dict[str, Any] = read_torch_file(file, advice=self._start_over())
                return state
        raise CheckpointError(
            f"{pointer.parent / latest['file']} is missing or damaged, and so is any previous checkpoint: delete "
            f"{self.path} and run again"
        )

    def _read_pointer(self, pointer: Path) -> dict[str, Any]:
        latest = read_json(pointer, schemas.LatestCheckpoint, error=CheckpointError, advice=self._start_over())
        return dict(latest)

    def _start_over(self) -> str:
        return f"delete {self.path} and run again"

    def write_status(self, state: str, **facts: Any) -> None:
        """Replace status.json."""
        if self.writes:
            write_json(self.path / "status.json", {"state": state, "pid": os.getpid(), "updated": time.time(), **facts})

    def read_state(self) -> str | None:
        """Return the state in status.json; None if there is none that can be read."""
        try:
            status = read_json(self.path / "status.json")
        except DataError:
            return None
        return str(status["state"]) if isinstance(status, dict) and "state" in status else None

    def read_result(self) -> dict[str, Any] | None:
        """Read the result of a finished run, see `read_finished_run`."""
        return read_finished_run(self.path)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which marks the run as finished."""
        if self.writes:
            write_json(self.path / RESULT, seal(result))
