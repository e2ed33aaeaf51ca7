"""Read recorded training dynamics: the outputs of networks for every training sample after every epoch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.arrays import as_labels
from kdfast.data.stateless_random import IntArray
from kdfast.dynamics import format as layout
from kdfast.errors import DataError, UsageError
from kdfast.files import schemas, sha256_file
from kdfast.files.arrays import read_npy
from kdfast.files.validate import check_type

Float16Array = npt.NDArray[np.float16]
BoolArray = npt.NDArray[np.bool_]

_RECORD_AGAIN = "run kdfast dynamics again"


class Dynamics:
    """Recorded dynamics. Open them with `Dynamics.open`.

    Attributes:
        path: The folder.
        n: Training samples, N.
        epochs: Recorded epochs, E.
        runs: Number of runs.
        labels: int64 (N,), the labels during recording.
        labels_digest: SHA-256 of the labels.
        fingerprint: Fingerprint of the data; None if the recording loop gave none.
        feature_epochs: Epochs after which features were recorded, counted from 0.
        facts: Further metadata passed to the recorder.
        top_k: Number of classes kept of each prediction, k; 0 if none.
        record: When correctness was recorded: `epoch`, or `batch` if also in the training batches.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self._version: int = manifest["version"]
        self.n: int = manifest["samples"]
        self.epochs: int = manifest["epochs"]
        self.runs: int = len(manifest["runs"])
        self.labels_digest: str = manifest["labels"]
        self.fingerprint: str | None = manifest["fingerprint"]
        self.feature_epochs: list[int] = manifest["feature_epochs"]
        self.facts: dict[str, Any] = manifest["facts"]
        self.top_k: int = manifest.get("top_k", 0)
        self.record: str = manifest.get("record", "epoch")
        self._classes: int = manifest.get("classes", 0)
        self.labels: IntArray = _load(path / layout.LABELS, (self.n,), np.int64)
        if layout.labels_digest(self.labels) != self.labels_digest:
            raise DataError(f"{path / layout.LABELS} is damaged: delete {path} and run kdfast dynamics again")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        labels: npt.ArrayLike | None = None,
        fingerprint: str | None = None,
        check_files: bool = True,
    ) -> Dynamics:
        """Open dynamics, and check that they are complete and belong to the data.

        Args:
            path: The folder.
            labels: Integers (N,), of the data to use them with; None: not compared.
            fingerprint: Fingerprint of that data; compared if the recording has one.
            check_files: Compare the SHA-256 of every file and not only its size.

        Raises:
            DataError: The dynamics are unfinished, damaged, or belong to other data.
        """
        folder = Path(path)
        if not (folder / layout.MANIFEST).exists():
            raise DataError(_unfinished(folder))
        manifest = layout.read_sealed_json(folder / layout.MANIFEST, schemas.FormatVersion)
        if manifest["format"] != layout.FORMAT or manifest["version"] not in layout.METRICS:
            raise DataError(f"{folder} does not hold dynamics of this version of kdfast: record them again")
        check_type(manifest, schemas.DynamicsManifest, folder / layout.MANIFEST, advice=_RECORD_AGAIN)
        for run, files in enumerate(manifest["runs"]):
            layout.require_files(folder / layout.run_folder(run), files, check_sums=check_files)
        dynamics = cls(folder, manifest)
        dynamics.check_matches(labels, fingerprint)
        return dynamics

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which covers all files."""
        return sha256_file(self.path / layout.MANIFEST)

    def p_y(self, run: int) -> Float16Array:
        """Return the probability of the label, float16 (E, N), memory-mapped."""
        return self._metric(run, "p_y")

    def p_other(self, run: int) -> Float16Array:
        """Return the largest probability of a class other than the label, float16 (E, N), memory-mapped.

        Raises:
            UsageError: There is no such run, or the dynamics were recorded by a version of kdfast without it.
        """
        return self._metric(run, "p_other")

    def margin(self, run: int) -> Float16Array:
        """Return the logit of the label minus the largest other logit, float16 (E, N), memory-mapped."""
        return self._metric(run, "margin")

    def el2n(self, run: int) -> Float16Array:
        """Return the L2 norm of probabilities minus one-hot label, float16 (E, N), memory-mapped."""
        return self._metric(run, "el2n")

    def correct(self, run: int, *, when: str = "epoch", samples: slice = slice(None)) -> BoolArray:
        """Return whether the arg-max is the label, bool (E, N), or (E, n) for some samples.

        Args:
            run: The run.
            when: `epoch`, after each epoch; or `batch`, before the step of the last training batch of the epoch that
                held the sample, augmented as it was trained on. A sample that was in no batch of the epoch keeps the
                value of the epoch before, at first False, and so do those outside the run's mask.
            samples: Consecutive samples from a multiple of 8 on, bits being packed; by default all.

        Raises:
            UsageError: There is no such run, or correctness in training batches was not recorded.
        """
        layout.check_when("when", when)
        if when == "batch" and self.record != "batch":
            raise UsageError(
                f"{self.path} was recorded without correctness in training batches: record again with kdfast dynamics "
                "and record=batch, to another folder"
            )
        name = layout.CORRECT if when == "epoch" else layout.CORRECT_BATCH
        packed = self._array(run, f"{name}.npy", (self.epochs, -(-self.n // 8)), np.uint8)
        start, stop, _ = samples.indices(self.n)
        if start % 8:
            raise UsageError(f"`samples` start at {start}: start at a multiple of 8")
        part = packed[:, start // 8 : -(-stop // 8)]
        return np.unpackbits(part, axis=1, count=stop - start).astype(np.bool_)

    def mask(self, run: int) -> BoolArray:
        """Return which samples the run trained on, bool (N,)."""
        return np.unpackbits(self._array(run, layout.MASK, (-(-self.n // 8),), np.uint8), count=self.n).astype(np.bool_)

    def features(self, run: int, epoch: int) -> npt.NDArray[np.float32]:
        """Return the inputs of the classifier after an epoch, counted from 0; float32 (N, D), memory-mapped.

        Raises:
            UsageError: There is no such run, or no features were recorded after that epoch.
        """
        if epoch not in self.feature_epochs:
            held = ", ".join(str(one + 1) for one in self.feature_epochs) or "no"
            raise UsageError(
                f"{self.path} holds features after {held} epochs of training, not after {epoch + 1}: use one of "
                "those, or record features after more epochs"
            )
        return self._array(run, layout.array_file(layout.FEATURES, epoch), (self.n, -1), np.float32)

    @property
    def classes(self) -> int:
        """Number of classes, C.

        Raises:
            UsageError: No predictions were recorded.
        """
        self._require_predictions()
        return self._classes

    def top(self, run: int, epoch: int) -> tuple[npt.NDArray[np.unsignedinteger[Any]], Float16Array]:
        """Return the most probable classes after an epoch and their probabilities, memory-mapped.

        Classes are in descending order of probability. The others have together what is missing to 1, which rounding
        may make negative.

        Args:
            run: The run.
            epoch: The epoch, from 0.

        Returns:
            Unsigned integers (N, k) and float16 (N, k), with k = `top_k`.

        Raises:
            UsageError: There is no such run or epoch, or no predictions were recorded.
        """
        self._require_predictions()
        if not 0 <= epoch < self.epochs:
            raise UsageError(f"{self.path} holds the epochs 0 to {self.epochs - 1}, not {epoch}: choose one of them")
        shape, dtype = (self.n, self.top_k), layout.class_dtype(self._classes).type
        ids = self._array(run, layout.array_file(layout.TOP_IDS, epoch), shape, dtype)
        return ids, self._array(run, layout.array_file(layout.TOP_P, epoch), shape, np.float16)

    def check_matches(self, labels: npt.ArrayLike | None = None, fingerprint: str | None = None) -> None:
        """Check that the dynamics belong to the data; None is not compared.

        Raises:
            DataError: They were recorded on other data.
        """
        if fingerprint is not None and self.fingerprint is not None and fingerprint != self.fingerprint:
            raise DataError(
                f"{self.path} was recorded on other data (fingerprint {self.fingerprint[:12]}; this data has "
                f"{fingerprint[:12]}): run kdfast dynamics on this data"
            )
        if labels is None:
            return
        labels = as_labels(labels)
        if len(labels) != self.n or layout.labels_digest(labels) != self.labels_digest:
            raise DataError(
                f"{self.path} was recorded on {self.n} samples, this data has {len(labels)}, or other labels: "
                "run kdfast dynamics on this data"
            )

    def _require_predictions(self) -> None:
        if not self.top_k:
            raise UsageError(
                f"{self.path} was recorded without predictions: record again with kdfast dynamics and, for "
                "example, top_k=5, to another folder"
            )

    def _metric(self, run: int, name: str) -> Float16Array:
        if name not in layout.METRICS[self._version]:
            raise UsageError(
                f"{self.path} was recorded by an earlier version of kdfast, without {name}: record again with kdfast "
                "dynamics, to another folder"
            )
        return self._array(run, f"{name}.npy", (self.epochs, self.n), np.float16)

    def _array(self, run: int, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
        if not 0 <= run < self.runs:
            raise UsageError(f"{self.path} holds the runs 0 to {self.runs - 1}, not {run}: choose one of them")
        return _load(self.path / layout.run_folder(run) / name, shape, dtype)


def _unfinished(folder: Path) -> str:
    """Return the message about a folder without a manifest."""
    if not (folder / layout.PLAN).exists():
        return f"{folder} holds no dynamics: record them with kdfast dynamics"
    epochs = layout.read_sealed_json(folder / layout.PLAN, schemas.DynamicsPlan)["epochs"]
    states = []
    for run in sorted(folder.glob("run-*")):
        sealed = (run / layout.SEAL).exists()
        done = epochs if sealed else sum((run / layout.epoch_file(e)).exists() for e in range(epochs))
        states.append(f"{run.name} has {done} of {epochs} epochs")
    held = ", ".join(states[-3:]) or "no run has begun"
    return f"{folder} is unfinished ({held}): run the same kdfast dynamics command again to resume"


def _load(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Memory-map an array; -1 in the shape means any length."""
    return read_npy(path, shape=shape, dtype=dtype, mmap_mode="r", advice=_RECORD_AGAIN)
