"""Record the dynamics of a training run, from inside any training loop."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.arrays import as_array
from kdfast.data.source import check_labels
from kdfast.data.stateless_random import IntArray
from kdfast.dynamics import format as layout
from kdfast.dynamics.metrics import compute_metrics
from kdfast.errors import DataError, OutputError, ShapeError, UsageError, describe_changes
from kdfast.files import (
    FolderLock,
    atomic_write,
    check_writable,
    make_subfolder,
    remove_stale,
    schemas,
    sha256_file,
    visible_entries,
    write_sealed,
)
from kdfast.files.arrays import read_npy, read_npz

SampleIds: TypeAlias = Tensor | npt.ArrayLike
Values: TypeAlias = Tensor | npt.NDArray[Any]

_HEADER_BYTES = 4096  # more than the header of an array of one epoch, or a digest

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


class DynamicsRecorder:
    """Record a network's outputs for every training sample after every epoch.

        with DynamicsRecorder("dyn", len(labels), labels, epochs=30) as recorder:
            for epoch in range(recorder.epoch, 30):
                ...                                    # train
                for ids, images in samples:            # every sample once, without augmentation
                    recorder.update(ids, net(images))
                recorder.end_epoch()

    Each ended epoch is on disk; a recording that was killed resumes at `recorder.epoch`. After the last epoch of the
    last run the folder is complete and `Dynamics.open` reads it.

    Args:
        path: The folder; created if missing. Runs of the same data and length share it.
        n: Number of training samples, N.
        labels: Integers (N,), their classes.
        epochs: Epochs to record.
        run: Index of this run, from 0.
        runs: Number of runs; once all are recorded the folder is complete.
        mask: bool (N,), the samples that this run trains on; by default all. The others are recorded too.
        fingerprint: Fingerprint of the data, if it is a kdfast source. The labels are compared in any case.
        feature_epochs: Epochs (from 0) after which `update` also needs features.
        facts: Further JSON values to store. A folder recorded with different values raises an error.

    Attributes:
        epoch: The epoch to record next.
        folder: The folder of this run's files.

    Raises:
        UsageError: An argument is out of range, or the folder holds other dynamics.
        DataError: The labels or the mask do not fit.
        OutputError: The folder cannot be written, holds other files, or another process records this run.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        n: int,
        labels: npt.ArrayLike,
        *,
        epochs: int,
        run: int = 0,
        runs: int = 1,
        mask: npt.NDArray[np.bool_] | None = None,
        fingerprint: str | None = None,
        feature_epochs: Sequence[int] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        n, epochs, run, runs = map(_as_int, ("n", "epochs", "run", "runs"), (n, epochs, run, runs))
        feature_epochs = [_as_int("feature_epochs", epoch) for epoch in feature_epochs]
        if epochs < 1 or not 0 <= run < runs:
            raise UsageError(
                f"`epochs` is {epochs}, run {run} of {runs}: pass at least one epoch, and a run from 0 to {runs - 1}"
            )
        if not all(0 <= epoch < epochs for epoch in feature_epochs):
            raise UsageError(f"`feature_epochs` is {feature_epochs}: pass epochs from 0 to {epochs - 1}")
        self.path = Path(path)
        self._labels = check_labels(labels, n, "dynamics")
        if n < 1 or int(self._labels.min()) < 0:
            raise DataError("dynamics need at least one sample, and labels from 0 on: check the labels")
        self._mask = np.ones(n, np.bool_) if mask is None else as_array(mask, "the mask", f"bool ({n},)")
        if self._mask.shape != (n,) or self._mask.dtype != np.bool_ or not self._mask.any():
            raise DataError(f"the mask is {self._mask.dtype} {self._mask.shape}: pass bool ({n},), not all False")
        self._epochs, self._runs = epochs, runs
        self._feature_epochs = sorted(set(feature_epochs))
        plan = {
            "format": layout.FORMAT,
            "version": layout.VERSION,
            "samples": n,
            "epochs": epochs,
            "labels": layout.labels_digest(self._labels),
            "fingerprint": fingerprint,
            "feature_epochs": self._feature_epochs,
            "facts": _as_json(facts or {}),
        }
        self._claim(plan)
        self.folder = make_subfolder(self.path, layout.run_folder(run))
        self.epoch = 0
        self._closed = False
        self._lock = FolderLock(self.folder)
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._lock)
            self._resume()
            undo.pop_all()
        self._allocate()

    @property
    def finished(self) -> bool:
        """Whether all epochs of this run are recorded."""
        return self.epoch == self._epochs

    @property
    def wants_features(self) -> bool:
        """Whether `update` needs features in the current epoch."""
        return self.epoch in self._feature_epochs

    def update(self, sample_ids: SampleIds, logits: Values, features: Values | None = None) -> None:
        """Record the logits of some samples; of a sample given twice in an epoch, the last values count.

        Args:
            sample_ids: Integers (B,), indices into the training split.
            logits: (B, C), floating point, of the current network; on any device.
            features: (B, D), inputs of the classifier; needed if `wants_features`, else ignored.

        Raises:
            ShapeError: The shapes or dtypes do not fit.
            DataError: Ids are out of range, logits are not finite, or features are missing.
            UsageError: All epochs are recorded, or the recorder is closed.
        """
        self._check_open()
        if self.finished:
            raise UsageError(f"{self.folder} has all {self._epochs} epochs: end the loop, or record more `epochs`")
        ids = self._check_ids(sample_ids)
        scores = _as_floats(logits, "logits")
        if scores.ndim != 2 or len(scores) != len(ids) or scores.shape[1] <= int(self._labels.max()):
            raise ShapeError(
                f"logits {tuple(scores.shape)} for {len(ids)} samples: pass (B, C) with a column for each of the "
                f"{int(self._labels.max()) + 1} classes"
            )
        if not bool(torch.isfinite(scores).all()):
            raise DataError(f"logits are not finite in epoch {self.epoch}: training diverged; lower its learning rate")
        if self.wants_features:
            self._record_features(ids, features)
        for name, values in compute_metrics(scores, torch.from_numpy(self._labels[ids]).to(scores.device)).items():
            self._values[name][ids] = values
        self._seen[ids] = True

    def end_epoch(self) -> None:
        """Write the epoch to disk; after the last epoch, complete the run.

        Raises:
            DataError: Some samples were not given in this epoch.
            UsageError: All epochs are recorded.
            OutputError: The epoch cannot be written.
        """
        self._check_open()
        if self.finished:
            raise UsageError(f"{self.folder} has all {self._epochs} epochs: end the loop")
        if not self._seen.all():
            missing = np.flatnonzero(~self._seen)
            raise DataError(
                f"epoch {self.epoch}: {len(missing)} of {len(self._seen)} samples were never given (for example "
                f"{missing[0]}): pass every training sample, including those the run does not train on"
            )
        packed: dict[str, Any] = {**self._values, "correct": np.packbits(self._values["correct"])}
        if self._features is not None:
            path = self.folder / layout.features_file(self.epoch)
            with atomic_write(path) as file:
                np.save(file, self._features)
            packed[layout.FEATURES_DIGEST] = np.array(sha256_file(path))
        with atomic_write(self.folder / layout.epoch_file(self.epoch)) as file:
            np.savez(file, **packed)
        self.epoch += 1
        self._allocate()
        if self.epoch == self._epochs:
            self._seal()

    def rewind(self, epoch: int) -> None:
        """Discard the epochs from `epoch` on, for training that resumed from an older checkpoint.

        Raises:
            UsageError: There are fewer epochs, the run is complete, or the recorder is closed.
        """
        self._check_open()
        if not 0 <= epoch <= self.epoch or self.finished:
            raise UsageError(
                f"{self.folder} has {self.epoch} epochs and cannot go back to {epoch}: rewind an unfinished run"
            )
        self.epoch = epoch
        for later in range(epoch, self._epochs):
            (self.folder / layout.epoch_file(later)).unlink(missing_ok=True)
        self._allocate()

    def close(self) -> None:
        """Release the run to other processes; keep what is written."""
        self._closed = True
        self._lock.__exit__(None, None, None)

    def __enter__(self) -> DynamicsRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _claim(self, plan: dict[str, Any]) -> None:
        """Write the plan, or check that the folder has the same plan; one without a recorded epoch is replaced."""
        check_dynamics_folder(self.path)
        folder = check_writable(self.path)
        with FolderLock(folder):
            remove_stale(folder)
            check_dynamics_folder(folder)
            if (folder / layout.PLAN).exists():
                held = layout.read_sealed_json(folder / layout.PLAN, schemas.DynamicsPlan)
                changed = [name for name, value in plan.items() if held.get(name) != value]
                if changed and _discard_empty_runs(folder):
                    (folder / layout.LABELS).unlink(missing_ok=True)
                    write_sealed(folder / layout.PLAN, plan)
                elif changed:
                    raise UsageError(
                        f"{folder} holds dynamics with other data or settings: "
                        f"{describe_changes(_settings(held, changed), _settings(plan, changed))}. Choose another "
                        "folder, delete this one, or use the same data and settings"
                    )
            else:
                write_sealed(folder / layout.PLAN, plan)
            self._write_or_check_labels(folder / layout.LABELS)

    def _write_or_check_labels(self, path: Path) -> None:
        if not path.exists():
            with atomic_write(path) as file:
                np.save(file, self._labels)
            return
        advice = "delete it and start again; it is written anew, and what is recorded stays"
        held = read_npy(path, shape=self._labels.shape, dtype=np.int64, advice=advice)
        if not np.array_equal(held, self._labels):
            raise DataError(f"{path} does not hold the labels of this recording: {advice}")

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"the recorder of {self.folder} is closed: make another one, which resumes the run")

    def _resume(self) -> None:
        """Find the first epoch that is not recorded."""
        remove_stale(self.folder)
        if (self.folder / layout.SEAL).exists():
            self.epoch = self._epochs
            self._complete()
            return
        mask = np.packbits(self._mask)
        if (self.folder / layout.MASK).exists():
            held = read_npy(self.folder / layout.MASK, shape=mask.shape, dtype=np.uint8, advice=self._record_again())
            if not np.array_equal(held, mask):
                raise UsageError(f"{self.folder} was started with another mask: choose another folder")
        else:
            with atomic_write(self.folder / layout.MASK) as file:
                np.save(file, mask)
        while self.epoch < self._epochs and (self.folder / layout.epoch_file(self.epoch)).exists():
            self._read_epoch(self.epoch)
            self.epoch += 1
        if self.finished:
            self._seal()

    def _allocate(self) -> None:
        """Allocate the arrays of one epoch."""
        n = 0 if self.finished else len(self._labels)
        self._values: dict[str, npt.NDArray[Any]] = {name: np.zeros(n, np.float16) for name in layout.METRICS}
        self._values["correct"] = np.zeros(n, np.bool_)
        self._seen = np.zeros(n, np.bool_)
        self._features: npt.NDArray[np.float32] | None = None

    def _check_ids(self, sample_ids: SampleIds) -> IntArray:
        given = as_array(sample_ids, "sample ids", "integers (B,)")
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or not len(given):
            raise ShapeError(f"sample ids are {given.dtype} {given.shape}: pass integers (B,), at least one")
        if given.min() < 0 or given.max() >= len(self._labels):
            raise DataError(f"sample ids go from {given.min()} to {given.max()}: pass 0 to {len(self._labels) - 1}")
        return given.astype(np.int64)

    def _record_features(self, ids: IntArray, features: Values | None) -> None:
        if features is None:
            raise DataError(f"features of epoch {self.epoch} are missing: pass `features` to update()")
        rows = _as_floats(features, "features").cpu().numpy()
        if rows.ndim != 2 or len(rows) != len(ids):
            raise ShapeError(f"features {rows.shape} for {len(ids)} samples: pass (B, D)")
        if self._features is None:
            self._features = np.zeros((len(self._labels), rows.shape[1]), np.float32)
        if rows.shape[1] != self._features.shape[1] or not np.isfinite(rows).all():
            raise DataError(f"features of epoch {self.epoch} change their width or are not finite: check the network")
        self._features[ids] = rows

    def _seal(self) -> None:
        """Join the epochs into the final arrays, write the seal, then remove the epochs' files."""
        epochs = [self._read_epoch(epoch) for epoch in range(self._epochs)]
        for name in (*layout.METRICS, "correct"):
            with atomic_write(self.folder / f"{name}.npy") as file:
                np.save(file, np.stack([epoch[name] for epoch in epochs]))
        names = [f"{name}.npy" for name in layout.METRICS] + [layout.CORRECT, layout.MASK]
        names += [layout.features_file(epoch) for epoch in self._feature_epochs]
        write_sealed(self.folder / layout.SEAL, {"files": layout.compute_file_digests(self.folder, names)})
        self._complete()

    def _read_epoch(self, epoch: int) -> dict[str, npt.NDArray[Any]]:
        """Read a recorded epoch of this unfinished run, and check its features.

        Raises:
            DataError: Its files are damaged.
        """
        path, n = self.folder / layout.epoch_file(epoch), len(self._labels)
        arrays = read_npz(path, member_bytes=_HEADER_BYTES + 2 * n, advice=self._record_again())
        wanted: dict[str, tuple[np.dtype[Any], tuple[int]]] = {
            name: (np.dtype(np.float16), (n,)) for name in layout.METRICS
        }
        wanted["correct"] = (np.dtype(np.uint8), (-(-n // 8),))
        if any(name not in arrays or (arrays[name].dtype, arrays[name].shape) != wanted[name] for name in wanted):
            raise DataError(f"{path} does not hold an epoch of {n} samples: {self._record_again()}")
        features = self.folder / layout.features_file(epoch)
        # Recorders of earlier versions wrote no digest of the features.
        if layout.FEATURES_DIGEST in arrays and str(arrays[layout.FEATURES_DIGEST]) != sha256_file(features):
            raise DataError(f"{features} is damaged: {self._record_again()}")
        return arrays

    def _record_again(self) -> str:
        return f"remove {self.folder} to record that run again"

    def _complete(self) -> None:
        """Remove the epochs' files; once all runs are sealed, write the manifest."""
        for epoch in range(self._epochs):
            (self.folder / layout.epoch_file(epoch)).unlink(missing_ok=True)
        seals = [self.path / layout.run_folder(run) / layout.SEAL for run in range(self._runs)]
        if not all(seal.exists() for seal in seals):
            return
        with FolderLock(self.path):
            plan = layout.read_sealed_json(self.path / layout.PLAN, schemas.DynamicsPlan)
            runs = [layout.read_sealed_json(seal, schemas.RunSeal)["files"] for seal in seals]
            write_sealed(self.path / layout.MANIFEST, {**plan, "runs": runs})


def check_dynamics_folder(folder: Path) -> None:
    """Check that a folder is missing or empty, or holds dynamics, finished or not. Writes nothing.

    Raises:
        OutputError: It holds something else.
    """
    entries = visible_entries(folder)
    if entries and not (folder / layout.PLAN).exists():
        raise OutputError(f"{folder} is not empty ({entries[0]}) and holds no dynamics: choose another folder")


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


def _as_int(name: str, value: Any) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise UsageError(f"`{name}` is {value!r}: pass a whole number")


def _as_json(facts: Mapping[str, Any]) -> dict[str, Any]:
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


def _as_floats(values: Values, name: str) -> Tensor:
    if isinstance(values, Tensor) and values.layout == torch.strided:
        if values.is_complex() or values.dtype == torch.bool:
            raise ShapeError(f"{name} are {str(values.dtype).removeprefix('torch.')}: pass real numbers")
        return values.detach().float()
    array = as_array(values, name, "real numbers, one row per sample")
    if array.dtype.kind not in "fiu":
        raise ShapeError(f"{name} are {array.dtype}: pass real numbers")
    with np.errstate(over="ignore"):  # infinity is refused later
        return torch.from_numpy(np.array(array, np.float32, order="C"))
