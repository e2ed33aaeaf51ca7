"""What a run's folder holds: its files, its finished result, and whether it may be used for another run."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.errors import CheckpointError, DataError, OutputError, UsageError, describe_changes
from kdfast.files import matches_seal, read_json, refuse_links, schemas, visible_entries, without_seal
from kdfast.nets.checkpoint import check_finite, read_model_file

# Key of config.json whose value is informative only; all other keys are compared before a run resumes.
METADATA_KEY = "started_with"

# Files that a run writes beside its checkpoints. A folder with one of them must have a run's config.json.
RESULT = "result.json"
RUN_FILES = ("config.json", "metrics.jsonl", "status.json", RESULT, "student.pt")

RESUME = ("auto", "never", "overwrite")

# Earlier versions took batch norm over the share of a process, so that runs of several were runs of their own.
_PROCESSES = "processes"

CHECKPOINTS = "checkpoints"
POINTER = "latest.json"


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
        content = read_model_file(student, advice=advice)
        check_finite(student, content["state_dict"])
    except CheckpointError as error:
        rest = "" if advice in str(error) else f"; or {advice}"
        raise CheckpointError(f"the run is finished, but {error}{rest}") from error
    same_accuracy = content["metadata"].get("test_top1", result["test_top1"]) == result["test_top1"]
    if content["digest"] != result["weights"] or not same_accuracy:
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
    if resume == "overwrite":
        return False
    if not (path / CHECKPOINTS / POINTER).exists() and not (path / RESULT).exists():
        return False
    saved, new = read_json(file, schemas.RunConfigFile), json.loads(json.dumps(config))
    saved.pop(METADATA_KEY)
    if saved.get(_PROCESSES) == 1:
        del saved[_PROCESSES]
    if changes := describe_changes(saved, new):
        own = "; the file with the student's code has changed" if "student_code" in changes else ""
        raise UsageError(f"{path} holds a run with other settings: {changes}{own}. Choose another `out`, or delete it")
    return True


def _holds_run(path: Path, file: Path) -> bool:
    """Return whether the folder holds a run, False if it is empty or missing; raise if it holds anything else."""
    present = visible_entries(path)
    if not any((path / CHECKPOINTS).glob("*")):  # the first thing that a run makes
        present = [name for name in present if name != CHECKPOINTS]
    if not present:
        return False
    if not is_run_config(file):
        name = next((name for name in RUN_FILES if name in present), present[0])
        raise OutputError(f"{path} holds {name}, which was not written by a run: choose another `out`")
    return True


def is_run_config(file: Path) -> bool:
    """Return whether a file is the config.json of a run."""
    config = read_json(file) if file.exists() else None
    return isinstance(config, dict) and METADATA_KEY in config


def checkpoint_files(path: Path) -> list[Path]:
    """Return the saved states of a run and the file that points to them."""
    folder = refuse_links(path, CHECKPOINTS)
    if not folder.is_dir():
        return []
    names = [n for n in os.listdir(folder) if n == POINTER or re.fullmatch(schemas.CHECKPOINT_NAME, n)]
    # Without the pointer, files that remain after a kill are no checkpoints.
    return [folder / name for name in sorted(names, key=lambda name: name != POINTER)]
