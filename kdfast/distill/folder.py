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
from kdfast.files import FolderLock, atomic_write, check_writable, read_json, remove_stale, sha256_file, write_json

# What decides whether two runs are the same is compared on resuming; this part of config.json is for the reader.
FACTS = "started_with"

# The files that a run writes beside its checkpoints; where one of them is, config.json must say that they are a run's.
OWN = ("config.json", "metrics.jsonl", "status.json", "result.json", "student.pt")

# Files that tell the folders of other stages.
FOREIGN_MARKS = ("manifest.json", ".building", "train.beton", "data.json")


class RunFolder:
    """The files of one training run.

    config.json holds the resolved settings and fingerprints, metrics.jsonl a line per logged step (append-only, no
    step twice), status.json what ran, result.json the outcome, student.pt the weights, checkpoints/ the latest states.

    Args:
        path: Where; made when missing.
        config: What decides the weights. A folder that holds a run of another config is refused, unless that run has
            saved nothing yet.
        facts: More for config.json, which may change between a start and a resume: paths, device, versions.
        resume: `auto` goes on with what the folder holds, `never` wants a folder without a run.
        writes: False for the processes of a run that only read the folder; their writes do nothing.

    Raises:
        UsageError: If the folder holds a run of other settings.
        OutputError: If it cannot be written, is in use by another process, holds files of a run's names that are no
            run's, or holds a run and `resume` is `never`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Mapping[str, Any],
        *,
        facts: Mapping[str, Any] | None = None,
        resume: str = "auto",
        writes: bool = True,
    ) -> None:
        if resume not in ("auto", "never"):
            raise UsageError(f"--resume is {resume!r}; needed: auto or never")
        self.path = Path(path)
        self.writes = writes
        if writes:
            check_writable(self.path)
        self._lock = FolderLock(self.path)
        self._config = json.loads(json.dumps(config))
        self._facts = dict(facts or {})
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
        goes_on = check_run_folder(self.path, self._config, self.resume)
        file, checkpoints = self.path / "config.json", self.path / "checkpoints"
        remove_stale(self.path)
        if goes_on:
            remove_stale(checkpoints)
            return
        (self.path / "metrics.jsonl").unlink(missing_ok=True)
        try:
            checkpoints.mkdir(exist_ok=True)
        except OSError as error:
            raise OutputError(f"cannot make {checkpoints}: {error.strerror}; choose another --out") from error
        write_json(file, {**self._config, FACTS: self._facts})

    def save_checkpoint(self, state: Mapping[str, Any], step: int) -> None:
        """Write the state after `step` steps under its own name, point latest.json to it, keep the one before it."""
        if not self.writes:
            return
        folder = self.path / "checkpoints"
        pointer, file = folder / "latest.json", folder / f"step-{step:09d}.pt"
        before = {k: v for k, v in read_json(pointer).items() if k != "before"} if pointer.exists() else None
        with atomic_write(file) as temporary:
            torch.save(dict(state), temporary)
        write_json(pointer, {"file": file.name, "step": step, "sha256": sha256_file(file), "before": before})
        kept = {file.name} | ({before["file"]} if before else set())
        for other in folder.glob("step-*.pt"):
            if other.name not in kept:
                other.unlink()

    def load_checkpoint(self) -> dict[str, Any] | None:
        """The latest state that is whole, or None when none was saved.

        Raises:
            CheckpointError: If the last two files are damaged or missing.
        """
        pointer = self.path / "checkpoints" / "latest.json"
        if not pointer.exists():
            return None
        latest = read_json(pointer)
        if not (isinstance(latest, dict) and {"file", "sha256"} <= latest.keys()):
            raise CheckpointError(f"{pointer} is damaged; delete {self.path} and run again")
        entries: list[dict[str, Any]] = [entry for entry in (latest, latest.get("before")) if entry]
        for entry in entries:
            file = pointer.parent / str(entry["file"])
            if file.exists() and sha256_file(file) == entry["sha256"]:
                state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
                return state
        raise CheckpointError(
            f"{pointer.parent / str(latest['file'])} is missing or damaged, and so is the one before it, if there was "
            f"one; delete {self.path} and run again"
        )

    def write_status(self, state: str, **facts: Any) -> None:
        """Replace status.json."""
        if self.writes:
            write_json(self.path / "status.json", {"state": state, "pid": os.getpid(), "updated": time.time(), **facts})

    def read_result(self) -> dict[str, Any] | None:
        """The outcome of a finished run, or None; without its student a run is not finished.

        Raises:
            DataError: If the file is no run's outcome.
        """
        file = self.path / "result.json"
        if not file.exists() or not (self.path / "student.pt").exists():
            return None
        result = read_json(file)
        if not isinstance(result, dict) or not {"test_top1", "steps", "weights"} <= result.keys():
            raise DataError(f"{file} is no run's outcome: it was changed; delete {self.path} and run again")
        return result

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json; from then on the run counts as finished."""
        if self.writes:
            write_json(self.path / "result.json", dict(result))


def check_run_folder(path: Path, config: Mapping[str, Any], resume: str) -> bool:
    """Whether a folder holds progress of the very run that is to be started in it; only looked at, it may be missing.

    Args:
        path: The folder.
        config: As for `RunFolder`.
        resume: As there.

    Raises:
        UsageError: It holds a run of other settings.
        OutputError: It is a file or holds other things than a run, or a run where `resume` is `never`.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file; choose another --out")
    file = path / "config.json"
    if not _holds_run(path, file):
        for foreign in FOREIGN_MARKS:
            if (path / foreign).exists():
                raise OutputError(f"{path} holds {foreign}, so it is no run's folder; choose another --out")
        return False
    if resume == "never":
        raise OutputError(f"{path} already holds a run; choose another --out, or --resume auto to go on with it")
    if not (path / "checkpoints" / "latest.json").exists() and not (path / "result.json").exists():
        return False
    held, wanted = read_json(file), json.loads(json.dumps(config))
    held.pop(FACTS)
    changed = sorted(k for k in {*held, *wanted} if held.get(k) != wanted.get(k))
    if changed:
        first = changed[0]
        raise UsageError(
            f"{path} holds a run with other settings ({', '.join(changed)}: {first} was {held.get(first)!r}, is "
            f"{wanted.get(first)!r}); choose another --out"
        )
    return True


def _holds_run(path: Path, file: Path) -> bool:
    present = [name for name in OWN if (path / name).exists()]
    if not present and not any((path / "checkpoints").glob("*")):
        return False
    config = read_json(file) if file.exists() else None
    if not isinstance(config, dict) or FACTS not in config:
        name = present[0] if present else "checkpoints"
        raise OutputError(f"{path} holds {name}, which no run has written there; choose another --out")
    return True


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
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
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
            self._file.write(json.dumps(dict(row)).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot append to {self.path}: {error.strerror}; free space and run again") from error
        self.last_step = row["step"]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
