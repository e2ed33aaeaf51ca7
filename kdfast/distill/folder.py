"""Folder of a run: config, metrics, status, result, checkpoints and student, each written atomically."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdfast.errors import CheckpointError, DataError, OutputError, UsageError, describe_changes
from kdfast.files import (
    FolderLock,
    atomic_write,
    check_writable,
    make_subfolder,
    matches_seal,
    open_own,
    read_json,
    remove_stale,
    schemas,
    seal,
    sha256_file,
    visible_entries,
    without_seal,
    write_json,
)
from kdfast.files.validate import decode_json
from kdfast.nets.checkpoint import load_model
from kdfast.nets.foreign import read_torch_file

# Key of config.json whose value is informative only; all other keys are compared before a run resumes.
METADATA_KEY = "started_with"

# Files that a run writes beside its checkpoints. A folder with one of them must have a run's config.json.
RESULT = "result.json"
RUN_FILES = ("config.json", "metrics.jsonl", "status.json", RESULT, "student.pt")

CHECKPOINTS = "checkpoints"
# The start of a row of metrics.jsonl, as far as a killed process has written it.
_ROW_START = b'{"step": '


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
        resume: `auto` resumes the run in the folder, if any; `never` requires a folder without a run.
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
        if resume not in ("auto", "never"):
            raise UsageError(f"`resume` is {resume!r}: pass auto or never")
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
        self._lock.__exit__(None, None, None)

    def _claim(self) -> None:
        resumes = check_run_folder(self.path, self._config, self.resume)
        checkpoints = make_subfolder(self.path, CHECKPOINTS)  # whoever ran it may have removed it after its end
        remove_stale(self.path)
        remove_stale(checkpoints)
        if resumes:
            return
        (self.path / "metrics.jsonl").unlink(missing_ok=True)
        write_json(self.path / "config.json", {**self._config, METADATA_KEY: self._metadata})

    def save_checkpoint(self, state: Mapping[str, Any], step: int) -> None:
        """Write the state after `step` steps to a new file, point latest.json to it, and keep the previous one."""
        if not self.writes:
            return
        folder = self.path / CHECKPOINTS
        pointer, file = folder / "latest.json", folder / f"step-{step:09d}.pt"
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

    def load_checkpoint(self) -> dict[str, Any] | None:
        """Load the latest intact state; None if none was saved.

        Raises:
            CheckpointError: If the last two files are damaged or missing.
        """
        pointer = self.path / CHECKPOINTS / "latest.json"
        if not pointer.exists():
            return None
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

    def read_result(self) -> dict[str, Any] | None:
        """Read the result of a finished run, see `read_finished_run`."""
        return read_finished_run(self.path)

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Write result.json, which marks the run as finished."""
        if self.writes:
            write_json(self.path / RESULT, seal(result))


def read_finished_run(path: Path) -> dict[str, Any] | None:
    """Read the result of a finished run, and check that its student is the network that was evaluated.

    Returns:
        The content of result.json; None if the result or the student is missing.

    Raises:
        DataError: If result.json is damaged.
        CheckpointError: If student.pt is damaged, or is not the student of this result.
    """
    file, student = path / RESULT, path / "student.pt"
    result = read_result(path)
    if result is None or not student.exists():
        return None
    advice = f"delete {student} and run the same command again, which writes it anew"
    try:
        model = load_model(student, advice=advice)
    except CheckpointError as error:
        rest = "" if advice in str(error) else f"; or {advice}"
        raise CheckpointError(f"the run is finished, but {error}{rest}") from error
    same_accuracy = model.metadata.get("test_top1", result["test_top1"]) == result["test_top1"]
    if model.digest != result["weights"] or not same_accuracy:
        raise CheckpointError(f"{student} is not the student that {file} describes: {advice}")
    return result


def read_result(path: Path) -> dict[str, Any] | None:
    """Read result.json alone.

    Returns:
        Its content; None if it is missing.

    Raises:
        DataError: If it is damaged or was edited.
    """
    file = path / RESULT
    if not file.exists():
        return None
    result: dict[str, Any] = read_json(file, schemas.RunResult, advice=f"delete {path} and run again")
    if not matches_seal(result):
        raise DataError(
            f"{file} was damaged or edited, it does not match its own digest: delete it and run the same command "
            "again, which writes it anew"
        )
    return without_seal(result)


def check_run_folder(path: Path, config: Mapping[str, Any], resume: str) -> bool:
    """Return whether a folder holds saved progress of the same run. Writes nothing.

    Args:
        path: The folder; may be missing.
        config: As for `RunFolder`.
        resume: As for `RunFolder`.

    Raises:
        UsageError: If the folder holds a run with other settings.
        OutputError: If the path is a file, or the folder holds anything but a run, or a run while `resume` is `never`.
    """
    if path.exists() and not path.is_dir():
        raise OutputError(f"{path} is a file: choose another `out`")
    file = path / "config.json"
    if not _holds_run(path, file):
        return False
    if resume == "never":
        raise OutputError(f"{path} already holds a run: choose another `out`, or `resume` auto to resume it")
    if not (path / CHECKPOINTS / "latest.json").exists() and not (path / RESULT).exists():
        return False
    saved, new = read_json(file, schemas.RunConfigFile), json.loads(json.dumps(config))
    saved.pop(METADATA_KEY)
    if changes := describe_changes(saved, new):
        raise UsageError(f"{path} holds a run with other settings: {changes}. Choose another `out`, or delete it")
    return True


def _holds_run(path: Path, file: Path) -> bool:
    """Return whether the folder holds a run, False if it is empty or missing; raise if it holds anything else."""
    present = visible_entries(path)
    if not any((path / CHECKPOINTS).glob("*")):  # the first thing that a run makes
        present = [name for name in present if name != CHECKPOINTS]
    if not present:
        return False
    config = read_json(file) if file.exists() else None
    if not isinstance(config, dict) or METADATA_KEY not in config:
        name = next((name for name in RUN_FILES if name in present), present[0])
        raise OutputError(f"{path} holds {name}, which was not written by a run: choose another `out`")
    return True


class MetricsFile:
    """metrics.jsonl: one JSON object per line, append-only, without repeated steps.

    Opening the file cuts off an incomplete last line, as left by a killed process.

    Args:
        path: The file; created if missing.

    Raises:
        DataError: If the last line is not a metrics row.
        OutputError: If the file cannot be written, or is a symbolic link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(open_own(path), "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self.last_step = self._cut_incomplete_line()
        except BaseException:
            self._file.close()
            raise

    def _cut_incomplete_line(self) -> int:
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        lines, rest = data[:end].splitlines(), data[end:]
        if not _ROW_START.startswith(rest[: len(_ROW_START)]):
            raise DataError(f"the last line of {self.path} is not a metrics row: move the file away")
        if rest:
            self._file.truncate(end)
        self._file.seek(end)
        if not lines:
            return -1
        where, advice = f"the last line of {self.path} is not a metrics row", "move the file away"
        return int(decode_json(lines[-1], schemas.MetricsRow, where, advice=advice)["step"])

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, unless its step is already there."""
        if row["step"] <= self.last_step:
            return
        try:
            self._file.write(json.dumps(dict(row)).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot append to {self.path}: {error.strerror}: free space and run again") from error
        self.last_step = row["step"]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
