"""The plan of a recording: what every run of a folder records."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.dynamics import format as layout
from kdfast.errors import DataError, OutputError, UsageError, describe_changes
from kdfast.files import (
    FolderLock,
    atomic_write,
    check_writable,
    delete_own,
    has_format,
    remove_stale,
    schemas,
    visible_entries,
    write_sealed,
)
from kdfast.files.arrays import read_npy

# Fields of a plan, in words for messages.
_WORDS = {
    "format": "format of the files",
    "version": "version of the format",
    "samples": "number of samples",
    "epochs": "number of recorded epochs",
    "labels": "digest of the labels",
    "fingerprint": "fingerprint of the data",
    "feature_epochs": "epochs with features",
}
# Fields that version 1 lacks, and their meaning there.
_ADDED: dict[str, Any] = {"top_k": 0, "classes": 0, "record": "epoch"}


@dataclass(frozen=True)
class RecordingPlan:
    """The content of plan.json.

    Attributes:
        samples: Number of training samples, N.
        epochs: Number of recorded epochs, E.
        labels: SHA-256 of the labels.
        fingerprint: Fingerprint of the data, or None.
        feature_epochs: Epochs (from 0) that have features.
        facts: Further JSON values.
        top_k: Number of classes kept of each prediction; 0: none.
        classes: Number of classes if predictions are kept, else 0.
        record: When correctness is recorded, one of `format.RECORD`.
        version: Version of the format.
    """

    samples: int
    epochs: int
    labels: str
    fingerprint: str | None
    feature_epochs: list[int]
    facts: dict[str, Any]
    top_k: int = 0
    classes: int = 0
    record: str = "epoch"
    version: int = layout.VERSION

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the float16 values of each sample and epoch."""
        return layout.METRICS[self.version]

    @property
    def bits(self) -> tuple[str, ...]:
        """Names of the bool values of each sample and epoch."""
        return (layout.CORRECT, layout.CORRECT_BATCH) if self.record == "batch" else (layout.CORRECT,)

    def arrays(self, epoch: int) -> list[str]:
        """Return the names of the arrays that have files of their own after an epoch."""
        names = [layout.FEATURES] if epoch in self.feature_epochs else []
        return names + [layout.TOP_IDS, layout.TOP_P] * (self.top_k > 0)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields of plan.json."""
        return {"format": layout.FORMAT, **dataclasses.asdict(self)}


def claim_folder(path: Path, plan: RecordingPlan, labels: IntArray) -> RecordingPlan:
    """Write the plan and the labels to a folder, or check that it has the same; one without an epoch is replaced.

    Args:
        path: The folder; created if missing.
        plan: What to record.
        labels: int64 (N,).

    Returns:
        The plan; of version 1 if the folder holds epochs of that version, which the recording continues.

    Raises:
        UsageError: The folder holds other dynamics.
        DataError: Its plan or its labels are damaged.
        OutputError: It cannot be written or holds other files.
    """
    check_dynamics_folder(path)
    folder = check_writable(path)
    with FolderLock(folder):
        remove_stale(folder)
        check_dynamics_folder(folder)
        if not (folder / layout.PLAN).exists():
            write_sealed(folder / layout.PLAN, plan.to_dict())
        else:
            plan = _match_held_plan(folder, plan)
        _write_or_check_labels(folder / layout.LABELS, labels)
    return plan


def check_dynamics_folder(folder: Path) -> None:
    """Check that a folder is missing or empty, or holds dynamics, finished or not. Writes nothing.

    Raises:
        OutputError: It holds something else.
    """
    entries = visible_entries(folder)
    if entries and not has_format(folder / layout.PLAN, layout.FORMAT):
        raise OutputError(f"{folder} is not empty ({entries[0]}) and holds no dynamics: choose another folder")


def delete_dynamics(folder: Path) -> None:
    """Delete the dynamics in a folder, finished or not; files that are not part of them stay.

    Raises:
        OutputError: The folder holds something else, or another process uses it.
    """
    check_dynamics_folder(folder)
    delete_own(folder, (layout.PLAN, layout.MANIFEST, layout.LABELS, "run-[0-9]*"))


def check_top_k(top_k: int, classes: int) -> None:
    """Check how many classes of each prediction to keep.

    Raises:
        UsageError: It is negative, or more than there are.
    """
    if not 0 <= top_k <= classes:
        raise UsageError(f"`top_k` is {top_k} of {classes} classes: pass 0 to {classes}")


def _match_held_plan(folder: Path, plan: RecordingPlan) -> RecordingPlan:
    held = {**_ADDED, **layout.read_sealed_json(folder / layout.PLAN, schemas.DynamicsPlan)}
    if held == plan.to_dict():
        return plan
    if _discard_empty_runs(folder):
        (folder / layout.LABELS).unlink(missing_ok=True)
        write_sealed(folder / layout.PLAN, plan.to_dict())
        return plan
    if held["version"] in layout.METRICS:
        plan = dataclasses.replace(plan, version=held["version"])
    fields = plan.to_dict()
    changed = [name for name, value in fields.items() if held.get(name) != value]
    if "top_k" in changed and "classes" in changed:
        changed.remove("classes")  # 0 without predictions
    if changed:
        raise UsageError(
            f"{folder} holds dynamics with other data or settings: "
            f"{describe_changes(_settings(held, changed), _settings(fields, changed))}. Choose another "
            "folder, delete this one, or use the same data and settings"
        )
    return plan


def _write_or_check_labels(path: Path, labels: IntArray) -> None:
    if not path.exists():
        with atomic_write(path) as file:
            np.save(file, labels)
        return
    advice = "delete it and start again; it is written anew, and what is recorded stays"
    held = read_npy(path, shape=labels.shape, dtype=np.int64, advice=advice)
    if not np.array_equal(held, labels):
        raise DataError(f"{path} does not hold the labels of this recording: {advice}")


def _discard_empty_runs(folder: Path) -> bool:
    """Remove what runs wrote before their first epoch, as after diverged training, so that other settings may follow.

    Returns:
        False, with nothing removed, if an epoch is recorded or another process records.
    """
    runs = [run for run in folder.glob("run-*") if run.is_dir() and not run.is_symlink()]
    if any((run / layout.SEAL).exists() or any(run.glob("epoch-*.npz")) for run in runs):
        return False
    with contextlib.ExitStack() as locks:
        try:
            for run in runs:
                locks.enter_context(FolderLock(run))
        except OutputError:
            return False
        for run in runs:
            (run / layout.MASK).unlink(missing_ok=True)
    return True


def _settings(plan: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """Return fields of a plan under the names that messages use; facts and settings of the training by their own."""
    facts = dict(plan.get("facts") or {}) if "facts" in names else {}
    training = facts.pop("training", {})
    if not isinstance(training, Mapping):
        training = {"training": training}
    fields = {_WORDS.get(name, name): plan.get(name) for name in names if name != "facts"}
    return {**fields, **training, **facts}


def as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return facts as they are after being written and read, so that tuples compare as lists.

    Raises:
        UsageError: They are not JSON values.
    """
    try:
        return dict(json.loads(json.dumps(dict(facts), allow_nan=False)))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"`facts` are not JSON values ({error}): pass texts, finite numbers, lists and dicts"
        ) from error
