"""How a cache stores the logits of one view of one sample: of all classes, or of the most probable ones.

For many thousand classes the logits of all would fill disks. A row of the k most probable ones is a record of their
logits, their class ids, and the logarithm of what exp(logit / T) adds up to over the classes left out; it serves runs
at that temperature T only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.errors import UsageError
from kdfast.ops.kd_loss import TopKTeacher, topk_teacher
from kdfast.ops.kd_loss.validation import check_temperature

__all__ = ["Rows", "TeacherRows", "TopK", "window"]

TeacherRows = Tensor | TopKTeacher
"""Rows of a teacher as `kd_loss` takes them."""


@dataclass(frozen=True)
class TopK:
    """How many classes of a row are kept, and the temperature at which the others are summed up."""

    k: int
    temperature: float

    def check(self, classes: int) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: k is not below the number of classes, or the temperature is out of range.
        """
        if not 1 <= self.k < classes:
            raise UsageError(f"top-k is {self.k}: give 1 to {classes - 1}, or leave it out to keep all {classes}")
        check_temperature(self.temperature, name="--temperature", error=UsageError)


@dataclass(frozen=True)
class Rows:
    """The form of a cache's rows.

    Attributes:
        classes: Number of classes.
        dtype: Of a logit, float16 or float32.
        top_k: The classes that are kept; None for all.
    """

    classes: int
    dtype: np.dtype[Any]
    top_k: TopK | None = None

    @staticmethod
    def of_manifest(manifest: dict[str, Any]) -> Rows:
        """The form that a cache's manifest declares."""
        kept = manifest.get("top_k")
        return Rows(manifest["data"]["classes"], np.dtype(manifest["dtype"]), None if kept is None else TopK(**kept))

    @property
    def element(self) -> np.dtype[Any]:
        """Type of the stored array's elements."""
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
        """Size of a row."""
        return int(self.element.itemsize * np.prod(self.shape, dtype=np.int64))

    def pack(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Logits (..., C) as rows (..., *shape)."""
        if self.top_k is None:
            return logits.astype(self.dtype)
        kept = topk_teacher(torch.from_numpy(logits.reshape(-1, self.classes)), self.top_k.k, self.top_k.temperature)
        rows = np.empty(len(kept.tail), self.element)
        for name, part in kept._asdict().items():
            rows[name] = part.numpy()
        return rows.reshape(logits.shape[:-1])

    def unpack(self, rows: npt.NDArray[Any]) -> TopKTeacher:
        """Records (n,) as `kd_loss` takes them."""
        parts = (np.ascontiguousarray(rows[name]) for name in TopKTeacher._fields)
        return TopKTeacher(*(torch.from_numpy(part) for part in parts))


def window(rows: TeacherRows, begin: int, end: int) -> TeacherRows:
    """Some of the rows."""
    return TopKTeacher(*(part[begin:end] for part in rows)) if isinstance(rows, TopKTeacher) else rows[begin:end]
