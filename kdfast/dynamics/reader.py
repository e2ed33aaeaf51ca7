"""Recorded training dynamics: what networks said of every training sample after every epoch of their training."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.dynamics import format as layout
from kdfast.dynamics.recorder import DynamicsRecorder
from kdfast.errors import DataError, UsageError
from kdfast.files import sha256_file

__all__ = ["Dynamics", "DynamicsRecorder"]

Halves = npt.NDArray[np.float16]
Flags = npt.NDArray[np.bool_]


class Dynamics:
    """Opened dynamics. Make one with `Dynamics.open`.

    Attributes:
        path: The folder.
        n: Training samples, N.
        epochs: Recorded epochs, E.
        runs: Number of runs.
        labels: int64 (N,), the classes they were recorded with.
        labels_digest: SHA-256 of those.
        fingerprint: Of the data; None where the recording loop gave none.
        feature_epochs: Epochs after which features were kept.
        facts: What else the recorder was told.
    """

    def __init__(self, path: Path, manifest: dict[str, Any]) -> None:
        self.path = path
        self.n: int = manifest["samples"]
        self.epochs: int = manifest["epochs"]
        self.runs: int = len(manifest["runs"])
        self.labels_digest: str = manifest["labels"]
        self.fingerprint: str | None = manifest["fingerprint"]
        self.feature_epochs: list[int] = manifest["feature_epochs"]
        self.facts: dict[str, Any] = manifest["facts"]
        self.labels: IntArray = _load(path / layout.LABELS, (self.n,), np.int64)
        if layout.labels_digest(self.labels) != self.labels_digest:
            raise DataError(f"{path / layout.LABELS} is damaged; delete {path} and run kdfast dynamics again")

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        labels: IntArray | None = None,
        fingerprint: str | None = None,
        check_files: bool = True,
    ) -> Dynamics:
        """Open dynamics and make sure that they are whole and belong to the data.

        Args:
            path: The folder.
            labels: int64 (N,), of the data they are to be used with.
            fingerprint: Of that data; compared where the recording has one.
            check_files: Compare the SHA-256 of every file, not the sizes alone.

        Raises:
            DataError: They are unfinished, damaged, or of other data.
        """
        folder = Path(path)
        if not (folder / layout.MANIFEST).exists():
            raise DataError(_unfinished(folder))
        manifest = layout.read_sealed_json(folder / layout.MANIFEST)
        if (manifest.get("format"), manifest.get("version")) != (layout.FORMAT, layout.VERSION):
            raise DataError(f"{folder} is no dynamics of this version of kdfast; record them again")
        for run, files in enumerate(manifest["runs"]):
            layout.require_files(folder / layout.run_folder(run), files, check_sums=check_files)
        dynamics = cls(folder, manifest)
        dynamics.require(labels, fingerprint)
        return dynamics

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which holds those of all files."""
        return sha256_file(self.path / layout.MANIFEST)

    def p_y(self, run: int) -> Halves:
        """Probability of the sample's class, float16 (E, N), memory-mapped."""
        return self._measure(run, "p_y")

    def margin(self, run: int) -> Halves:
        """Logit of the sample's class minus the largest other one, float16 (E, N), memory-mapped."""
        return self._measure(run, "margin")

    def el2n(self, run: int) -> Halves:
        """Euclidean norm of probabilities minus the one-hot class, float16 (E, N), memory-mapped."""
        return self._measure(run, "el2n")

    def correct(self, run: int) -> Flags:
        """Whether the arg-max is the sample's class, bool (E, N)."""
        packed = self._array(run, layout.CORRECT, (self.epochs, -(-self.n // 8)), np.uint8)
        return np.unpackbits(packed, axis=1, count=self.n).astype(np.bool_)

    def mask(self, run: int) -> Flags:
        """Which samples the run trained on, bool (N,)."""
        return np.unpackbits(self._array(run, layout.MASK, (-(-self.n // 8),), np.uint8), count=self.n).astype(np.bool_)

    def features(self, run: int, epoch: int) -> npt.NDArray[np.float32]:
        """What entered the classifier after an epoch, float32 (N, D), memory-mapped.

        Raises:
            UsageError: If there is no such run, or features were not kept after that epoch.
        """
        if epoch not in self.feature_epochs:
            held = ", ".join(str(one + 1) for one in self.feature_epochs) or "no"
            raise UsageError(
                f"{self.path} holds features after {held} epochs of training, not after {epoch + 1}; take one of "
                "those, or record with --features-every"
            )
        return self._array(run, layout.features_file(epoch), (self.n, -1), np.float32)

    def require(self, labels: IntArray | None = None, fingerprint: str | None = None) -> None:
        """Make sure that they belong to some data; None is not compared.

        Raises:
            DataError: If they were recorded on other data.
        """
        if fingerprint is not None and self.fingerprint is not None and fingerprint != self.fingerprint:
            raise DataError(
                f"{self.path} was recorded on other data (fingerprint {self.fingerprint[:12]}; this data has "
                f"{fingerprint[:12]}): run kdfast dynamics on this data"
            )
        if labels is None:
            return
        if len(labels) != self.n or layout.labels_digest(labels) != self.labels_digest:
            raise DataError(
                f"{self.path} was recorded on {self.n} samples, this data has {len(labels)}, or other labels: "
                "run kdfast dynamics on this data"
            )

    def _measure(self, run: int, name: str) -> Halves:
        return self._array(run, f"{name}.npy", (self.epochs, self.n), np.float16)

    def _array(self, run: int, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
        if not 0 <= run < self.runs:
            raise UsageError(f"{self.path} holds the runs 0 to {self.runs - 1}, not {run}")
        return _load(self.path / layout.run_folder(run) / name, shape, dtype)


def _unfinished(folder: Path) -> str:
    """Say what is missing of dynamics without a manifest."""
    if not (folder / layout.PLAN).exists():
        return f"{folder} holds no dynamics; make them with kdfast dynamics"
    epochs = layout.read_sealed_json(folder / layout.PLAN)["epochs"]
    states = []
    for run in sorted(folder.glob("run-*")):
        whole = (run / layout.SEAL).exists()
        done = epochs if whole else sum((run / layout.epoch_file(e)).exists() for e in range(epochs))
        states.append(f"{run.name} has {done} of {epochs} epochs")
    held = ", ".join(states[-3:]) or "no run has begun"
    return f"{folder} is unfinished ({held}); run the same kdfast dynamics command again"


def _load(path: Path, shape: tuple[int, ...], dtype: type[np.generic]) -> npt.NDArray[Any]:
    """Memory-map an array; -1 in the shape is any length."""
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"cannot read {path} ({error}); run kdfast dynamics again") from error
    fits = array.ndim == len(shape) and all(want in (-1, have) for want, have in zip(shape, array.shape, strict=True))
    if not fits or array.dtype != dtype:
        raise DataError(f"{path} is {array.dtype} {array.shape}, needed {dtype.__name__} {shape}; record it again")
    return array
