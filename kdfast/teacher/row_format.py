"""Row format of a cache: what a row holds of one view of one sample.

A row holds the logits of all classes; or the classifier's inputs, of which the logits are computed; or, for many
classes, a record of the k largest logits, their class ids, and for each of some temperatures T the log-sum-exp of
logit / T over the omitted classes. A record serves runs at those temperatures. With k = 10 and one temperature it takes
42 bytes, whatever the number of classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.errors import CacheMismatch, UsageError, shorten
from kdfast.ops.kd_loss import TopKTeacher
from kdfast.ops.kd_loss.validation import check_temperature

_BLOCK_BYTES = 1 << 20  # of logits: what a core's cache holds

__all__ = ["RowFormat", "TopK"]


@dataclass(frozen=True, init=False)
class TopK:
    """Number of classes to keep per row, and the temperatures at which the omitted ones are summed.

    Args:
        k: Number of classes.
        temperature: One temperature or several.

    Attributes:
        k: Number of classes.
        temperatures: The temperatures, ascending, each once.
    """

    k: int
    temperatures: tuple[float, ...]

    def __init__(self, k: int, temperature: float | Sequence[float]) -> None:
        several = temperature if isinstance(temperature, Sequence) else (temperature,)
        object.__setattr__(self, "k", k)
        object.__setattr__(self, "temperatures", tuple(sorted({float(one) for one in several})))

    def check(self, classes: int) -> None:
        """Check the values.

        Raises:
            UsageError: k is not below the number of classes, or a temperature is out of range, or there is none.
        """
        if not 1 <= self.k < classes:
            raise UsageError(f"`top_k` is {self.k}: pass 1 to {classes - 1}, or omit it to keep all {classes} classes")
        if not self.temperatures:
            raise UsageError("`temperature` is empty: pass at least one")
        for temperature in self.temperatures:
            check_temperature(temperature, name="`temperature`", error=UsageError)

    def to_dict(self) -> dict[str, Any]:
        """Return the values as they are written in a manifest."""
        return {"k": self.k, "temperatures": list(self.temperatures)}

    def column(self, temperature: float | None, where: object) -> int:
        """Return the position of a temperature; None: the only one.

        Args:
            temperature: The temperature of a run.
            where: The cache, for the message.

        Raises:
            CacheMismatch: The temperature is not among them, or there are several and none is given.
        """
        if temperature is None and len(self.temperatures) == 1:
            return 0
        if temperature not in self.temperatures:
            known = ", ".join(f"{one:g}" for one in self.temperatures)
            wanted = "none is given" if temperature is None else f"the run has {temperature:g}"
            which = "one of these" if len(self.temperatures) > 1 else known
            raise CacheMismatch(
                f"{where} holds the {self.k} most probable classes, and the others summed at temperature {known}, but "
                f"{wanted}: pass `temperature` {which}, or build a cache for the run's temperature"
            )
        return self.temperatures.index(temperature)


@dataclass(frozen=True)
class RowFormat:
    """Format of a cache's rows.

    Attributes:
        classes: Number of classes.
        dtype: dtype of a stored number, float16 or float32.
        top_k: The classes to keep; None for all.
        features: Width of the classifier's inputs, which are stored in place of logits; 0: logits are stored.
        wide: Whether records have 4-byte class ids and float32 tails, as those of earlier versions.
    """

    classes: int
    dtype: np.dtype[Any]
    top_k: TopK | None = None
    features: int = 0
    wide: bool = False

    @staticmethod
    def from_manifest(manifest: Mapping[str, Any]) -> RowFormat:
        """Return the format that a cache's manifest declares."""
        classes, dtype, given = manifest["data"]["classes"], np.dtype(manifest["dtype"]), manifest.get("top_k")
        if manifest.get("kind") == "features":
            return RowFormat(classes, dtype, features=manifest["features"])
        if given is None:
            return RowFormat(classes, dtype)
        if ("temperature" in given) == ("temperatures" in given):
            raise CacheMismatch(f"`top_k` of the manifest is {shorten(given)}: build the cache again")
        if "temperature" in given:
            return RowFormat(classes, dtype, TopK(given["k"], given["temperature"]), wide=True)
        return RowFormat(classes, dtype, TopK(given["k"], given["temperatures"]))

    @property
    def element(self) -> np.dtype[Any]:
        """Dtype of the stored array's elements."""
        if self.top_k is None:
            return self.dtype
        k, tails = self.top_k.k, len(self.top_k.temperatures)
        if self.wide:
            return np.dtype([("values", self.dtype, (k,)), ("classes", "<i4", (k,)), ("tail", "<f4")])
        class_id = "<u2" if self.classes <= 1 << 16 else "<i4"
        return np.dtype([("values", self.dtype, (k,)), ("classes", class_id, (k,)), ("tail", self.dtype, (tails,))])

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of a row in the stored array."""
        return (self.features or self.classes,) if self.top_k is None else ()

    @property
    def row_bytes(self) -> int:
        """Size of a row in bytes."""
        return int(self.element.itemsize * np.prod(self.shape, dtype=np.int64))

    def pack(self, logits: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """Convert logits (..., C), or features (..., D), to rows (..., *shape)."""
        if self.top_k is None:
            return logits.astype(self.dtype)
        given = torch.from_numpy(logits.reshape(-1, self.classes))
        rows = np.empty(len(given), self.element)
        block = max(1, _BLOCK_BYTES // (4 * self.classes))
        for begin in range(0, len(given), block):
            self._pack_largest(given[begin : begin + block], rows[begin : begin + block])
        return rows.reshape(logits.shape[:-1])

    def _pack_largest(self, logits: Tensor, rows: npt.NDArray[Any]) -> None:
        """Fill records with the largest of logits (n, C)."""
        assert self.top_k is not None
        values, classes = logits.topk(self.top_k.k + 1, 1)
        # Of the others, the largest is subtracted, so that no sum of exponentials is 0.
        largest, classes = values[:, -1:], classes[:, :-1]
        below = (logits - largest).scatter_(1, classes, -torch.inf)
        tails = [
            (below / temperature).exp_().sum(1).log_() + largest[:, 0] / temperature
            for temperature in self.top_k.temperatures
        ]
        with np.errstate(over="ignore"):  # the caller checks that they are finite
            for name, part in (("values", values[:, :-1]), ("classes", classes), ("tail", torch.stack(tails, 1))):
                rows[name] = part.numpy()

    def unpack(self, rows: npt.NDArray[Any], column: int) -> TopKTeacher:
        """Convert records (n,) to the form that `kd_loss` accepts, with the tail of a temperature."""
        values = torch.from_numpy(np.ascontiguousarray(rows["values"]))
        classes = torch.from_numpy(rows["classes"].astype(np.int32))
        tails = rows["tail"][:, None] if self.wide else rows["tail"]
        return TopKTeacher(values, classes, torch.from_numpy(tails[:, column].astype(np.float32)))
