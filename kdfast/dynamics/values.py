"""The values of one epoch, collected in memory in any order of the samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.arrays import as_array
from kdfast.data.stateless_random import IntArray
from kdfast.data.transfer import to_device
from kdfast.dynamics import format as layout
from kdfast.dynamics.metrics import compute_metrics, most_probable
from kdfast.dynamics.plan import RecordingPlan
from kdfast.errors import DataError, ShapeError
from kdfast.ops._torch_compat import wrapper_fault

SampleIds: TypeAlias = Tensor | npt.ArrayLike
Values: TypeAlias = Tensor | npt.NDArray[Any]

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class EpochValues:
    """What one epoch records of every sample.

    Args:
        epoch: The epoch, for messages.
        labels: int64 (N,).
        plan: What to record.

    Attributes:
        metrics: (N,) each: the metrics of `compute_metrics`.
        arrays: The arrays that have files of their own: float32 (N, D) features, and the most probable classes.
        seen: bool (N,), the samples that were added.
    """

    def __init__(self, epoch: int, labels: IntArray, plan: RecordingPlan) -> None:
        self._epoch, self._labels, self._plan = epoch, labels, plan
        self._least_classes = self._columns = int(labels.max()) + 1
        self.metrics: dict[str, npt.NDArray[Any]] = {}
        self.arrays: dict[str, npt.NDArray[Any]] = {}
        self.seen = np.zeros(len(labels), np.bool_)

    def add(self, sample_ids: SampleIds, logits: Values, features: Values | None) -> None:
        """Add some samples, see `DynamicsRecorder.update`."""
        ids = check_ids(sample_ids, len(self._labels))
        scores = check_logits(logits, len(ids), self._least_classes)
        top_k, classes = self._plan.top_k, scores.shape[1]
        self._columns = classes
        if top_k and classes != self._plan.classes:
            raise ShapeError(
                f"logits have {classes} columns, but `classes` is {self._plan.classes}: pass the number of columns"
            )
        if not bool(torch.isfinite(scores).all()):
            raise DataError(f"logits are not finite in epoch {self._epoch}: training diverged; lower its learning rate")
        if layout.FEATURES in self._plan.arrays(self._epoch):
            _put(self.arrays, layout.FEATURES, ids, self._check_features(ids, features), len(self._labels))
        for name, values in compute_metrics(scores, torch.from_numpy(self._labels[ids]).to(scores.device)).items():
            _put(self.metrics, name, ids, values, len(self._labels))
        if top_k:
            top_ids, top_p = most_probable(scores, top_k)
            top_ids = top_ids.astype(layout.class_dtype(classes))
            _put(self.arrays, layout.TOP_IDS, ids, top_ids, len(self._labels))
            _put(self.arrays, layout.TOP_P, ids, top_p, len(self._labels))
        self.seen[ids] = True

    def fill(self, before: Mapping[str, npt.NDArray[Any]] | None) -> None:
        """Give the samples that were not added the values of another epoch, or of an untrained network.

        Args:
            before: Values (N, ...) by name; None: those of equal logits, not correct.
        """
        if before is None:
            before = self._untrained()
        for arrays in (self.metrics, self.arrays):
            for name, array in arrays.items():
                array[~self.seen] = np.broadcast_to(before[name], array.shape)[~self.seen]

    def _untrained(self) -> dict[str, npt.NDArray[Any]]:
        """Return the values of equal logits, with a first axis of 1."""
        logits = torch.zeros(1, self._columns)
        values = compute_metrics(logits, torch.zeros(1, dtype=torch.int64))
        values["correct"] = np.zeros(1, np.bool_)
        if self._plan.top_k:
            values[layout.TOP_IDS], values[layout.TOP_P] = most_probable(logits, self._plan.top_k)
        return values

    def _check_features(self, ids: IntArray, features: Values | None) -> npt.NDArray[np.float32]:
        if features is None:
            raise DataError(f"features of epoch {self._epoch} are missing: pass `features` to update()")
        rows: npt.NDArray[np.float32] = as_floats(features, "features").cpu().numpy()
        if rows.ndim != 2 or len(rows) != len(ids):
            raise ShapeError(f"features {rows.shape} for {len(ids)} samples: pass (B, D)")
        width = self.arrays.get(layout.FEATURES, rows).shape[1]
        if rows.shape[1] != width or not np.isfinite(rows).all():
            raise DataError(f"features of epoch {self._epoch} change their width or are not finite: check the network")
        return rows


def _put(arrays: dict[str, npt.NDArray[Any]], name: str, ids: IntArray, rows: npt.NDArray[Any], n: int) -> None:
    """Set rows of an array of `n` rows; the last row of several of a sample counts."""
    if name not in arrays:
        arrays[name] = np.zeros((n, *rows.shape[1:]), rows.dtype)
    arrays[name][ids] = rows


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


def place_ids(sample_ids: SampleIds, n: int, device: torch.device) -> Tensor:
    """Return sample ids as int64 (B,) on a device; the values of those on a GPU are not checked, as that would wait.

    Raises:
        ShapeError: They are not integers (B,), or none.
        DataError: They are out of range.
    """
    if not isinstance(sample_ids, Tensor) or sample_ids.device.type == "cpu" or _has_no_values(sample_ids):
        return to_device(torch.from_numpy(check_ids(sample_ids, n)), device)
    if sample_ids.ndim != 1 or not len(sample_ids) or sample_ids.dtype not in _INTEGERS:
        raise ShapeError(
            f"sample ids are {sample_ids.dtype} {tuple(sample_ids.shape)}: pass integers (B,), at least one"
        )
    return sample_ids.to(device, torch.int64)


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
        if fault := wrapper_fault(values):
            raise ShapeError(f"{name}: it {fault}")
        if _has_no_values(values) or values.is_quantized:
            kind = "quantized" if values.is_quantized else "on the meta device, which holds no values"
            raise ShapeError(f"{name} are {kind}: pass real numbers")
        return values.detach().float()
    array = as_array(values, name, "real numbers, one row per sample")
    if array.dtype.kind not in "fiu":
        raise ShapeError(f"{name} are {array.dtype}: pass real numbers")
    with np.errstate(over="ignore"):  # infinity is refused later
        return torch.from_numpy(np.array(array, np.float32, order="C"))


def _has_no_values(tensor: Tensor) -> bool:
    """Return whether a tensor is on the meta device; a subclass of Tensor there may hold values of its own."""
    return tensor.is_meta and type(tensor) is Tensor
