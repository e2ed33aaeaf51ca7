"""The folder of a run: config, metrics, status, result, checkpoints, student; each written whole or not at all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdfast.errors import CheckpointError, DataError, OutputError, UsageError
from kdfast.files import FolderLock, atomic_write, check_writable, read_json, sha256_file, write_json

KEPT_CHECKPOINTS = 2


class RunFolder:
    """The files of one training run.

    config.json holds the resolved settings and fingerprints, metrics.jsonl a line per logged step (append-only, no
    step twice), status.json what ran, result.json the outcome, student.pt the weights, checkpoints/ the latest states.

    Args:
        path: Where; made when missing.
        config: The settings. A folder that holds a run of other settings is refused.
        resume: `auto` goes on with what the folder holds, `never` wants a folder without a run.
        writes: False for the processes of a run that only read the folder; their writes do nothing.

    Raises:
        UsageError: If the folder holds a run of other settings.
        OutputError: If it cannot be written, is in use by another process, or holds a run and `resume` is `never`.
    """

    def __init__(
        self, path: str | os.PathLike[str], config: Mapping[str, Any], *, resume: str = "auto", writes: bool = True
    ) -> None:
        if resume not in ("auto", "never"):
            raise UsageError(f"--resume is {resume!r}; needed: auto or never")
        self.path = Path(path)
        self.writes = writes
        if writes:
            check_writable(self.path)
        self._lock = FolderLock(self.path)
        self._config = json.loads(json.dumps(config))
        self.resume = resume

    def __enter__(self) -> RunFolder:
        if not self.writes:
            return self
        self._lock.__enter__()
        try:
            self._claim()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._lock.__exit__(None, None, None)

    def _claim(self) -> None:
        file = self.path / "config.json"
        if not file.exists():
            (self.path / "checkpoints").mkdir(exist_ok=True)
            write_json(file, self._config)
            return
        if self.resume == "never":
            raise OutputError(
                f"{self.path} already holds a run; choose another --out, or --resume auto to go on with it"
            )
        held = read_json(file)
        changed = sorted(k for k in {*held, *self._config} if held.get(k) != self._config.get(k))
        if changed:
            first = changed[0]
            raise UsageError(
                f"{self.path} holds a run with other settings ({', '.join(changed)}: {first} was {held.get(first)!r}, "
                f"is {self._config.get(first)!r}); choose another --out"
            )

    def save_checkpoint(self, state: Mapping[str, Any], step: int) -> None:
        """Write the state after `step` steps under its own name, then point latest.json to it and drop old ones."""
        if not self.writes:
            return
        folder = self.path / "checkpoints"
        file = folder / f"step-{step:09d}.pt"
        with atomic_write(file) as temporary:
            torch.save(dict(state), temporary)
        write_json(folder / "latest.json", {"file": file.name, "step": step, "sha256": sha256_file(file)})
        for old in sorted(folder.glob("step-*.pt"))[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The latest state, or None when there is none.

        Raises:
            CheckpointError: If the file is damaged or missing.
        """
        pointer = self.path / "checkpoints" / "latest.json"
        if not pointer.exists():
            return None
        latest = read_json(pointer)
        file = pointer.parent / str(latest["file"])
        if not file.exists() or sha256_file(file) != latest["sha256"]:
            raise CheckpointError(f"{file} is missing or damaged; delete {self.path} and run again")
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        return state

    def write_status(self, state: str, **facts: Any) -> None:
        """Replace status.json."""
        if self.writes:
            write_json(self.path / "status.json", {"state": state, "pid": os.getpid(), "updated": time.time(), **facts})

    def read_result(self) -> dict[str, Any] | None:
        """The outcome of a finished run, or None."""
        file = self.path / "result.json"
        return read_json(file) if file.exists() else None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json; from then on the run counts as finished."""
        if self.writes:
            write_json(self.path / "result.json", dict(result))


class MetricsFile:
    """metrics.jsonl: one JSON object a line, append-only; a step that is there already is not written again.

    A line that a killed process left unfinished is cut off on opening.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_step = self._repair()
        try:
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        except OSError as error:
            raise OutputError(f"cannot append to {path}: {error.strerror}") from error

    def _repair(self) -> int:
        if not self.path.exists():
            return -1
        with open(self.path, "r+b") as file:
            data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            if len(whole) != len(data):
                file.truncate(len(whole))
        lines = whole.splitlines()
        try:
            return int(json.loads(lines[-1])["step"]) if lines else -1
        except (ValueError, KeyError) as error:
            raise DataError(f"the last line of {self.path} is not a metrics row; move the file away") from error

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row, unless its step is already there."""
        if row["step"] <= self.last_step:
            return
        try:
            self._file.write(json.dumps(dict(row)) + "\n")
            self._file.flush()
        except OSError as error:
            raise OutputError(f"cannot append to {self.path}: {error.strerror}; free space and run again") from error
        self.last_step = row["step"]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
