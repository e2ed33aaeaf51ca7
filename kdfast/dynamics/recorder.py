"""Record the dynamics of a training run, from inside any training loop."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdfast.data.arrays import as_array
from kdfast.data.source import check_labels
from kdfast.dynamics import format as layout
from kdfast.dynamics.batches import BatchCorrectness
from kdfast.dynamics.plan import RecordingPlan, as_json, check_top_k, claim_folder
from kdfast.dynamics.run_files import RunFiles, write_manifest
from kdfast.dynamics.values import EpochValues, SampleIds, Values, as_floats, check_logits, place_ids
from kdfast.errors import DataError, UsageError
from kdfast.files import FolderLock, make_subfolder


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
        top_k: Classes to keep of each prediction, the most probable ones with their probabilities; 0: none.
        classes: Number of classes, C; needed with `top_k` if some have no sample. By default the largest label + 1.
        record: When correctness is recorded: `epoch`, by `update`; or `batch`, also in the training batches, by
            `update_batch`.
        incomplete: What to do with samples that an epoch lacks, as loops that drop their last batch leave some out:
            `error`, or `repeat` their values of the epoch before. In the first epoch these are the values of equal
            logits, and the prediction counts as wrong. Epochs with features must be complete.

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
        top_k: int = 0,
        classes: int | None = None,
        record: str = "epoch",
        incomplete: str = "error",
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
        classes = int(self._labels.max()) + 1 if classes is None else _as_int("classes", classes)
        check_top_k(_as_int("top_k", top_k), classes)
        layout.check_when("record", record)
        if incomplete not in ("error", "repeat"):
            raise UsageError(f"`incomplete` is {incomplete!r}: pass one of error, repeat")
        self._repeats = incomplete == "repeat"
        self._epochs, self._runs = epochs, runs
        self._feature_epochs = sorted(set(feature_epochs))
        plan = RecordingPlan(
            samples=n,
            epochs=epochs,
            labels=layout.labels_digest(self._labels),
            fingerprint=fingerprint,
            feature_epochs=self._feature_epochs,
            facts=as_json(facts or {}),
            top_k=int(top_k),
            classes=classes if top_k else 0,
            record=record,
        )
        self._plan = claim_folder(self.path, plan, self._labels)
        self.folder = make_subfolder(self.path, layout.run_folder(run))
        self._files = RunFiles(self.folder, self._plan)
        self._batches: BatchCorrectness | None = None
        self._closed = False
        self._lock = FolderLock(self.folder)
        with contextlib.ExitStack() as undo:
            undo.enter_context(self._lock)
            self.epoch = self._files.resume(self._mask)
            if self.finished:
                self._complete()
            undo.pop_all()
        self._values = self._new_values()

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
        self._values.add(sample_ids, logits, features)

    def update_batch(self, sample_ids: SampleIds, logits: Values) -> None:
        """Record whether the network is right about the samples of a training batch.

        Pass the logits that the loss is computed from. On a GPU nothing waits for it, so logits that are not finite,
        and ids on the GPU that are out of range, are reported by `end_epoch`. Of a sample given twice in an epoch, the
        last row counts. A sample that is in no batch of an epoch keeps the value of the epoch before, at first False.

        Args:
            sample_ids: Integers (B,), indices into the training split.
            logits: (B, C), floating point; on any device.

        Raises:
            ShapeError: The shapes or dtypes do not fit.
            DataError: Ids are out of range.
            UsageError: `record` is not `batch`, or the recorder is closed.
        """
        self._check_open()
        scores = as_floats(logits, "logits")
        batches = self.batches_on(scores.device)
        ids = place_ids(sample_ids, len(self._labels), batches.device)
        batches.add(ids, check_logits(scores, len(ids), int(self._labels.max()) + 1))

    def batches_on(self, device: torch.device) -> BatchCorrectness:
        """Return what `update_batch` adds to, for loops that replay their steps as CUDA graphs.

        Args:
            device: Device of the training; that of the first call stays.

        Raises:
            UsageError: `record` is not `batch`.
        """
        if self._plan.record != "batch":
            raise UsageError(f"`record` is {self._plan.record}: pass batch to record training batches")
        if self._batches is None:
            self._batches = BatchCorrectness(self._labels, device)
        return self._batches

    def end_epoch(self) -> None:
        """Write the epoch to disk; after the last epoch, complete the run.

        Raises:
            DataError: Some samples were not given in this epoch and cannot or may not be repeated; or no training batch
                was given with `record` batch.
            UsageError: All epochs are recorded.
            OutputError: The epoch cannot be written.
        """
        self._check_open()
        if self.epoch == self._epochs:
            raise UsageError(f"{self.folder} has all {self._epochs} epochs: end the loop")
        if not self._values.seen.all():
            self._repeat_missing()
        if self._plan.record == "batch":
            self._values.metrics[layout.CORRECT_BATCH] = self._read_batches()
        self._files.write_epoch(self.epoch, self._values)
        if self._batches is not None:
            self._batches.reset()
        self.epoch += 1
        self._values = self._new_values()
        if self.finished:
            self._complete()

    def rewind(self, epoch: int) -> None:
        """Discard the epochs from `epoch` on, for training that resumed from an older checkpoint.

        What `update` recorded of the current epoch is discarded too; what `update_batch` recorded stays.

        Raises:
            UsageError: There are fewer epochs, the run is complete, or the recorder is closed.
        """
        self._check_open()
        if not 0 <= epoch <= self.epoch or self.finished:
            raise UsageError(
                f"{self.folder} has {self.epoch} epochs and cannot go back to {epoch}: rewind an unfinished run"
            )
        self.epoch = epoch
        self._files.discard_epochs(epoch)
        self._values = self._new_values()

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

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError(f"the recorder of {self.folder} is closed: make another one, which resumes the run")

    def _repeat_missing(self) -> None:
        missing = np.flatnonzero(~self._values.seen)
        start = f"epoch {self.epoch}: {len(missing)} of {len(self._labels)} samples were never given (for example "
        start += f"{missing[0]}): pass every training sample"
        if not self._repeats or len(missing) == len(self._labels):
            raise DataError(
                f"{start}, including those the run does not train on, or `incomplete` repeat to keep their values of "
                "the epoch before"
            )
        if self.wants_features:
            raise DataError(f"{start}, because features of other epochs cannot stand in for those of this epoch")
        self._values.fill(self._files.read_values(self.epoch - 1) if self.epoch else None)

    def _read_batches(self) -> npt.NDArray[np.bool_]:
        """Return correctness in the batches of this epoch, bool (N,)."""
        correct, seen = self.batches_on(torch.device("cpu")).read()
        if not seen.any():
            raise DataError(
                f"no training batch was given in epoch {self.epoch}: pass each to update_batch(), or `record` epoch"
            )
        if self.epoch and not seen.all():
            correct = np.where(seen, correct, self._files.read_bits(self.epoch - 1, layout.CORRECT_BATCH))
        return correct

    def _new_values(self) -> EpochValues:
        return EpochValues(self.epoch, self._labels, self._plan)

    def _complete(self) -> None:
        """Seal the run, remove the epochs' files, and write the manifest once all runs are sealed."""
        if not self._files.sealed:
            self._files.seal()
        self._files.discard_epochs()
        write_manifest(self.path, self._runs)


def _as_int(name: str, value: Any) -> int:
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    raise UsageError(f"`{name}` is {value!r}: pass a whole number")
