"""Recording the dynamics of a training run, from inside whatever loop trains."""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.source import integer_labels
from kdfast.data.stateless_random import IntArray
from kdfast.dynamics import format as layout
from kdfast.dynamics.metrics import measures
from kdfast.errors import DataError, OutputError, ShapeError, UsageError
from kdfast.files import FolderLock, atomic_write, check_writable, remove_stale
from kdfast.teacher.manifest import write_sealed

_SAME = ("format", "version", "samples", "epochs", "labels", "fingerprint", "feature_epochs", "facts")

SampleIds: TypeAlias = Tensor | npt.ArrayLike
Values: TypeAlias = Tensor | npt.NDArray[Any]


class DynamicsRecorder:
    """Writes what a network says of every training sample after every epoch.

        with DynamicsRecorder("dyn", len(labels), labels, epochs=30) as recorder:
            for epoch in range(recorder.epoch, 30):
                ...                                    # train
                for ids, images in samples:            # every sample once, without augmentation
                    recorder.update(ids, net(images))
                recorder.end_epoch()

    Each ended epoch is on the disk for good; a killed recording goes on where it stood, at `recorder.epoch`. After the
    last epoch of the last run the folder is complete and `Dynamics.open` reads it.

    Args:
        path: The folder; made when missing. Runs of the same data and length share it.
        n: Number of training samples, N.
        labels: Integers (N,), their classes.
        epochs: Epochs to record.
        run: Which run this is, from 0.
        runs: How many runs there are to be; with the last one recorded the folder counts as complete.
        mask: bool (N,), the samples that this run trains on; all when not given. The others are recorded too.
        fingerprint: Of the data, where it is a kdfast source; the labels are compared in any case.
        feature_epochs: Epochs (from 0) after which `update` wants features as well.
        facts: More to keep: JSON values. A folder recorded with other facts is refused.

    Attributes:
        epoch: The epoch to be recorded next.
        folder: Where this run's files are.

    Raises:
        UsageError: Arguments out of range, or the folder holds other dynamics.
        DataError: Labels or mask do not fit.
        OutputError: The folder cannot be written, holds something else, or another process records this run.
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
        if epochs < 1 or not 0 <= run < runs:
            raise UsageError(f"{epochs} epochs, run {run} of {runs}: needed: an epoch or more, and runs from 0")
        if not all(0 <= epoch < epochs for epoch in feature_epochs):
            raise UsageError(f"features after the epochs {list(feature_epochs)} of {epochs}: needed: 0 to {epochs - 1}")
        self.path = Path(path)
        self._labels = integer_labels(labels, n, "dynamics")
        if n < 1 or int(self._labels.min()) < 0:
            raise DataError("dynamics need at least one sample, and labels from 0 on")
        self._mask = np.ones(n, np.bool_) if mask is None else np.asarray(mask)
        if self._mask.shape != (n,) or self._mask.dtype != np.bool_ or not self._mask.any():
            raise DataError(f"the mask is {self._mask.dtype} {self._mask.shape}; needed: bool ({n},), not all False")
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
            "facts": dict(facts or {}),
        }
        self._claim(plan)
        self.folder = check_writable(self.path / layout.run_folder(run))
        self.epoch = 0
        self._lock = FolderLock(self.folder)
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._lock)
            self._resume()
            undo.pop_all()
        self._begin()

    @property
    def finished(self) -> bool:
        """Whether all epochs of this run are recorded."""
        return self.epoch == self._epochs

    @property
    def wants_features(self) -> bool:
        """Whether features are to be given in the current epoch."""
        return self.epoch in self._feature_epochs

    def update(self, sample_ids: SampleIds, logits: Values, features: Values | None = None) -> None:
        """Take the logits of some samples; a sample that comes twice in an epoch keeps what came last.

        Args:
            sample_ids: Integers (B,), indices into the training split.
            logits: (B, C), floating point, of the network as it stands; on any device.
            features: (B, D), what entered the classifier; needed where `wants_features`, else ignored.

        Raises:
            ShapeError: Shapes do not fit.
            DataError: Ids out of range, logits that are not finite, or features missing.
            UsageError: All epochs are recorded already.
        """
        if self.finished:
            raise UsageError(f"{self.folder} has all {self._epochs} epochs; end the loop, or record with more epochs")
        ids = self._check_ids(sample_ids)
        scores = torch.as_tensor(logits).detach().float()
        if scores.ndim != 2 or len(scores) != len(ids) or scores.shape[1] <= int(self._labels.max()):
            raise ShapeError(
                f"logits {tuple(scores.shape)} for {len(ids)} samples; needed: (B, C) with a column for each of the "
                f"{int(self._labels.max()) + 1} classes"
            )
        if not bool(torch.isfinite(scores).all()):
            raise DataError(f"logits that are not finite in epoch {self.epoch}: the training diverged; lower its rate")
        if self.wants_features:
            self._take_features(ids, features)
        for name, values in measures(scores, torch.from_numpy(self._labels[ids]).to(scores.device)).items():
            self._values[name][ids] = values
        self._seen[ids] = True

    def end_epoch(self) -> None:
        """Write the epoch to the disk; after the last one complete the run.

        Raises:
            DataError: If some samples were not given in this epoch.
            OutputError: If it cannot be written.
        """
        if self.finished:
            raise UsageError(f"{self.folder} has all {self._epochs} epochs already")
        if not self._seen.all():
            missing = np.flatnonzero(~self._seen)
            raise DataError(
                f"epoch {self.epoch}: {len(missing)} of {len(self._seen)} samples were never given (for example "
                f"{missing[0]}); give every training sample, also those the run does not train on"
            )
        if self._features is not None:
            with atomic_write(self.folder / layout.features_file(self.epoch)) as file:
                np.save(file, self._features)
        packed: dict[str, Any] = {**self._values, "correct": np.packbits(self._values["correct"])}
        with atomic_write(self.folder / layout.epoch_file(self.epoch)) as file:
            np.savez(file, **packed)
        self.epoch += 1
        self._begin()
        if self.epoch == self._epochs:
            self._seal()

    def rewind(self, epoch: int) -> None:
        """Forget the epochs from `epoch` on, for training that resumed from an older checkpoint.

        Raises:
            UsageError: If there are not that many epochs, or the run is complete.
        """
        if not 0 <= epoch <= self.epoch or self.finished:
            raise UsageError(f"{self.folder} has {self.epoch} epochs; it cannot go back to {epoch}")
        self.epoch = epoch
        for later in range(epoch, self._epochs):
            (self.folder / layout.epoch_file(later)).unlink(missing_ok=True)
        self._begin()

    def close(self) -> None:
        """Let other processes record this run; what is written stays."""
        self._lock.__exit__(None, None, None)

    def __enter__(self) -> DynamicsRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _claim(self, plan: dict[str, Any]) -> None:
        """Write the plan, or make sure that the folder's is the same."""
        folder = check_writable(self.path)
        with FolderLock(folder):
            remove_stale(folder)
            if (folder / layout.PLAN).exists():
                held = layout.read_sealed_json(folder / layout.PLAN)
                changed = [name for name in _SAME if held.get(name) != plan[name]]
                if changed:
                    raise UsageError(
                        f"{folder} holds dynamics of other {', '.join(changed)}; give another folder, or the same data "
                        "and settings"
                    )
                return
            if any(entry.name != ".kdfast.lock" for entry in folder.iterdir()):
                raise OutputError(f"{folder} is not empty and holds no dynamics; choose another folder")
            with atomic_write(folder / layout.LABELS) as file:
                np.save(file, self._labels)
            write_sealed(folder / layout.PLAN, plan)

    def _resume(self) -> None:
        """Find out how far this run is."""
        remove_stale(self.folder)
        if (self.folder / layout.SEAL).exists():
            self.epoch = self._epochs
            self._complete()
            return
        mask = np.packbits(self._mask)
        if (self.folder / layout.MASK).exists():
            with _readable(self.folder / layout.MASK) as file:
                same = np.array_equal(np.load(file), mask)
            if not same:
                raise UsageError(f"{self.folder} was begun with another mask; choose another folder")
        else:
            with atomic_write(self.folder / layout.MASK) as file:
                np.save(file, mask)
        while self.epoch < self._epochs and (self.folder / layout.epoch_file(self.epoch)).exists():
            self.epoch += 1
        if self.finished:
            self._seal()

    def _begin(self) -> None:
        """Room for one epoch."""
        n = 0 if self.finished else len(self._labels)
        self._values: dict[str, npt.NDArray[Any]] = {name: np.zeros(n, np.float16) for name in layout.MEASURES}
        self._values["correct"] = np.zeros(n, np.bool_)
        self._seen = np.zeros(n, np.bool_)
        self._features: npt.NDArray[np.float32] | None = None

    def _check_ids(self, sample_ids: SampleIds) -> IntArray:
        given = sample_ids.detach().cpu().numpy() if isinstance(sample_ids, Tensor) else np.asarray(sample_ids)
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or not len(given):
            raise ShapeError(f"sample ids are {given.dtype} {given.shape}; needed: integers (B,), at least one")
        if given.min() < 0 or given.max() >= len(self._labels):
            raise DataError(
                f"sample ids from {given.min()} to {given.max()}; the data has {len(self._labels)} samples, from 0"
            )
        return given.astype(np.int64)

    def _take_features(self, ids: IntArray, features: Values | None) -> None:
        if features is None:
            raise DataError(f"features are to be recorded after epoch {self.epoch}; give them to update()")
        rows = torch.as_tensor(features).detach().float().cpu().numpy()
        if rows.ndim != 2 or len(rows) != len(ids):
            raise ShapeError(f"features {rows.shape} for {len(ids)} samples; needed: (B, D)")
        if self._features is None:
            self._features = np.zeros((len(self._labels), rows.shape[1]), np.float32)
        if rows.shape[1] != self._features.shape[1] or not np.isfinite(rows).all():
            raise DataError(f"features of epoch {self.epoch} change their width or are not finite; check the network")
        self._features[ids] = rows

    def _seal(self) -> None:
        """Put the epochs together, then write the seal, then remove the parts."""
        parts = [self.folder / layout.epoch_file(epoch) for epoch in range(self._epochs)]
        for name in (*layout.MEASURES, "correct"):
            rows = []
            for part in parts:
                with _readable(part) as file, np.load(file) as held:
                    rows.append(held[name])
            with atomic_write(self.folder / f"{name}.npy") as file:
                np.save(file, np.stack(rows))
        names = [f"{name}.npy" for name in layout.MEASURES] + [layout.CORRECT, layout.MASK]
        names += [layout.features_file(epoch) for epoch in self._feature_epochs]
        write_sealed(self.folder / layout.SEAL, {"files": layout.seal_of(self.folder, names)})
        self._complete()

    def _complete(self) -> None:
        """Remove the parts; with all runs sealed, write the manifest."""
        for epoch in range(self._epochs):
            (self.folder / layout.epoch_file(epoch)).unlink(missing_ok=True)
        seals = [self.path / layout.run_folder(run) / layout.SEAL for run in range(self._runs)]
        if not all(seal.exists() for seal in seals):
            return
        with FolderLock(self.path):
            plan = layout.read_sealed_json(self.path / layout.PLAN)
            runs = [layout.read_sealed_json(seal)["files"] for seal in seals]
            write_sealed(self.path / layout.MANIFEST, {**plan, "runs": runs})


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[BinaryIO]:
    """A file of a run under way, whose damage is said in words."""
    try:
        with path.open("rb") as file:
            yield file
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged ({error}): remove {path.parent} to record that run anew") from error
