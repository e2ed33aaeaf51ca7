"""Row format of a cache: a row holds the logits of one view of one sample, for all classes or for the k most probable.

With many thousand classes, the logits of all of them would fill disks. A row of the k most probable classes is a record
of their logits, their class ids, and the log-sum-exp of logit / T over the omitted classes. It is valid for runs at
that temperature T only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.errors import UsageError
from kdfast.ops.kd_loss import TopKTeacher, topk_teacher
from kdfast.ops.kd_loss.validation import check_temperature

__all__ = ["RowFormat", "TeacherLogits", "TopK", "map_logits", "slice_rows", "tensors_of"]

TeacherLogits = Tensor | TopKTeacher
"""Teacher logits of a batch, in a form that `kd_loss` accepts."""


@dataclass(frozen=True)
class TopK:
    """Number of classes to keep per row, and the temperature at which the omitted ones are summed."""

    k: int
    temperature: float

    def check(self, classes: int) -> None:
        """Check both values.

        Raises:
            UsageError: k is not below the number of classes, or the temperature is out of range.
        """
        if not 1 <= self.k < classes:
            raise UsageError(f"`top_k` is {self.k}: pass 1 to {classes - 1}, or omit it to keep all {classes} classes")
        check_temperature(self.temperature, name="`temperature`", error=UsageError)


@dataclass(frozen=True)
class RowFormat:
    """Format of a cache's rows.

    Attributes:
        classes: Number of classes.
        dtype: dtype of a logit, float16 or float32.
        top_k: The classes to keep; None for all.
    """

    classes: int
    dtype: np.dtype[Any]
    top_k: TopK | None = None

    @staticmethod
    def from_manifest(manifest: dict[str, Any]) -> RowFormat:
        """Return the format that a cache's manifest declares."""
        top_k = manifest.get("top_k")
        dtype = np.dtype(manifest["dtype"])
        return RowFormat(manifest["data"]["classes"], dtype, None if top_k is None else TopK(**top_k))

    @property
    def element(self) -> np.dtype[Any]:
        """Dtype of the stored array's elements."""
        if self.top_k is None:
            return self.dtype
        k = self.top_k.k
        return np.dtype([("values", self.dtype, (k,)), ("classes", "<i4", (k,)), ("tail", "<f4")])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row in the stored array."""
        return (self.classes,) if self.top_k is None else ()

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return int(self.element.itemsize * np.prod(self.shape, dtype=np.int64))

    def pack(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Convert logits (..., C) to rows (..., *shape)."""
        if self.top_k is None:
            return logits.astype(self.dtype)
        kept = topk_teacher(torch.from_numpy(logits.reshape(-1, self.classes)), self.top_k.k, self.top_k.temperature)
        rows = np.empty(len(kept.tail), self.element)
        for name, part in kept._asdict().items():
            rows[name] = part.numpy()
        return rows.reshape(logits.shape[:-1])

    def unpack(self, rows: npt.NDArray[Any]) -> TopKTeacher:
        """Convert records (n,) to the form that `kd_loss` accepts."""
        parts = (np.ascontiguousarray(rows[name]) for name in TopKTeacher._fields)
        return TopKTeacher(*(torch.from_numpy(part) for part in parts))


def tensors_of(logits: TeacherLogits) -> tuple[Tensor, ...]:
    """Return the tensors of teacher logits: one, or the three of a `TopKTeacher`."""
    return tuple(logits) if isinstance(logits, TopKTeacher) else (logits,)


def map_logits(change: Callable[[Tensor], Tensor], logits: TeacherLogits) -> TeacherLogits:
    """Apply a function to each tensor of teacher logits."""
    return TopKTeacher(*map(change, logits)) if isinstance(logits, TopKTeacher) else change(logits)


def slice_rows(logits: TeacherLogits, begin: int, end: int) -> TeacherLogits:
    """Return the rows from `begin` up to `end`."""
    return map_logits(lambda part: part[begin:end], logits)
