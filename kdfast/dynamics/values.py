"""The values of one epoch, collected in memory in any order of the samples."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.arrays import as_array
from kdfast.data.stateless_random import IntArray
from kdfast.dynamics.metrics import compute_metrics
from kdfast.errors import DataError, ShapeError

SampleIds: TypeAlias = Tensor | npt.ArrayLike
Values: TypeAlias = Tensor | npt.NDArray[Any]


class EpochValues:
    """What one epoch records of every sample.

    Args:
        epoch: The epoch, for messages.
        labels: int64 (N,).
        wants_features: Whether `add` needs features.

    Attributes:
        metrics: (N,) each: the metrics of `compute_metrics`.
        features: float32 (N, D), once some were added.
        seen: bool (N,), the samples that were added.
    """

    def __init__(self, epoch: int, labels: IntArray, *, wants_features: bool) -> None:
        self._epoch, self._labels, self._wants_features = epoch, labels, wants_features
        self._classes = int(labels.max()) + 1
        self.metrics: dict[str, npt.NDArray[Any]] = {}
        self.features: npt.NDArray[np.float32] | None = None
        self.seen = np.zeros(len(labels), np.bool_)

    def add(self, sample_ids: SampleIds, logits: Values, features: Values | None) -> None:
        """Add some samples, see `DynamicsRecorder.update`."""
        ids = check_ids(sample_ids, len(self._labels))
        scores = check_logits(logits, len(ids), self._classes)
        if not bool(torch.isfinite(scores).all()):
            raise DataError(f"logits are not finite in epoch {self._epoch}: training diverged; lower its learning rate")
        if self._wants_features:
            self._add_features(ids, features)
        for name, values in compute_metrics(scores, torch.from_numpy(self._labels[ids]).to(scores.device)).items():
            if name not in self.metrics:
                self.metrics[name] = np.zeros(len(self._labels), values.dtype)
            self.metrics[name][ids] = values
        self.seen[ids] = True

    def _add_features(self, ids: IntArray, features: Values | None) -> None:
        if features is None:
            raise DataError(f"features of epoch {self._epoch} are missing: pass `features` to update()")
        rows = as_floats(features, "features").cpu().numpy()
        if rows.ndim != 2 or len(rows) != len(ids):
            raise ShapeError(f"features {rows.shape} for {len(ids)} samples: pass (B, D)")
        if self.features is None:
            self.features = np.zeros((len(self._labels), rows.shape[1]), np.float32)
        if rows.shape[1] != self.features.shape[1] or not np.isfinite(rows).all():
            raise DataError(f"features of epoch {self._epoch} change their width or are not finite: check the network")
        self.features[ids] = rows


def check_ids(sample_ids: SampleIds, n: int) -> IntArray:
    """Return sample ids as int64 (B,).

    Raises:
        ShapeError: They are not integers (B,), or none.
        DataError: They are out of range.
    """
    given = as_array(sample_ids, "sample ids", "integers (B,)")
    if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or not len(given):
        raise ShapeError(f"sample ids are {given.dtype} {given.shape}: pass integers (B,), at least one")
    if given.min() < 0 or given.max() >= n:
        raise DataError(f"sample ids go from {given.min()} to {given.max()}: pass 0 to {n - 1}")
    return given.astype(np.int64)


def check_logits(logits: Values, count: int, classes: int) -> Tensor:
    """Return logits as float32 (B, C), on their device.

    Raises:
        ShapeError: They are not real numbers (B, C) with a column for each class.
    """
    scores = as_floats(logits, "logits")
    if scores.ndim != 2 or len(scores) != count or scores.shape[1] < classes:
        raise ShapeError(
            f"logits {tuple(scores.shape)} for {count} samples: pass (B, C) with a column for each of the "
            f"{classes} classes"
        )
    return scores


def as_floats(values: Values, name: str) -> Tensor:
    """Return real numbers as a float32 tensor, on their device.

    Raises:
        ShapeError: They are not real numbers.
    """
    if isinstance(values, Tensor) and values.layout == torch.strided:
        if values.is_complex() or values.dtype == torch.bool:
            raise ShapeError(f"{name} are {str(values.dtype).removeprefix('torch.')}: pass real numbers")
        return values.detach().float()
    array = as_array(values, name, "real numbers, one row per sample")
    if array.dtype.kind not in "fiu":
        raise ShapeError(f"{name} are {array.dtype}: pass real numbers")
    with np.errstate(over="ignore"):  # infinity is refused later
        return torch.from_numpy(np.array(array, np.float32, order="C"))
