"""Convert what a network puts out to logits: probabilities, log-probabilities, or logits at a temperature."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.errors import DataError, UsageError

Array = npt.NDArray[Any]

KINDS = ("logits", "probabilities", "log-probabilities")

# Largest distance of a sum of probabilities from 1: rounding of all classes.
_SUM_TOLERANCE = {16: 2e-2, 32: 1e-3, 64: 1e-3}
# A probability that was rounded to 0 counts as the smallest positive number of its dtype. Those of float64 were
# computed in float32 before: no softmax reaches further.
_SMALLEST = {16: 2.0**-24, 32: 2.0**-149, 64: 2.0**-149}


class Conversion:
    """Converts rows of a network's outputs to logits, and checks them.

    Args:
        kind: One of `KINDS`; None: logits, which must not look like probabilities.
        temperature: What the logits were divided by before the softmax, or before they were stored.
        bits: Bits of a stored number.
        what: The file or argument, for messages.

    Raises:
        UsageError: The kind does not exist, or the temperature is no positive number.
    """

    def __init__(self, kind: str | None, temperature: float, bits: int, what: str) -> None:
        if kind is not None and kind not in KINDS:
            raise UsageError(f"`kind` is {kind!r}: pass one of {', '.join(KINDS)}")
        if not 0 < temperature < np.inf:
            raise UsageError(f"`temperature` is {temperature}: pass a number above 0")
        self._is_assumed = kind is None
        self.kind = kind or KINDS[0]
        self.temperature = temperature
        self._tolerance, self._smallest, self._what = _SUM_TOLERANCE[bits], _SMALLEST[bits], what

    def __call__(self, rows: Array, first: int) -> npt.NDArray[np.float32]:
        """Return the raw logits of rows (n, V, C), float32; `first` is the sample of row 0.

        Raises:
            DataError: A number is not finite, or the rows are not of this kind; the message names the sample.
        """
        values = rows.astype(np.float64)
        # log(0) is -inf: a probability that was rounded to 0.
        allowed = np.isneginf(values) if self.kind == "log-probabilities" else np.zeros((), np.bool_)
        self._check(~(np.isfinite(values) | allowed).all(-1), first, values, "holds values that are not finite")
        if self.kind == "probabilities":
            self._check((values < 0).any(-1), first, values, "holds negative values, so no probabilities")
            self._check_sums(values.sum(-1), first, values)
            values = np.log(np.maximum(values, self._smallest))
        elif self.kind == "log-probabilities":
            self._check_sums(np.exp(values).sum(-1), first, values)
            values = np.maximum(values, np.log(self._smallest))
        elif self._is_assumed and (values >= 0).all() and self._sums_to_one(values.sum(-1)).all():
            raise DataError(
                f"{self._what}: every row has positive values that sum to 1: either probabilities, or logits by "
                "chance; pass `kind` probabilities, or logits"
            )
        with np.errstate(over="ignore"):
            logits: npt.NDArray[np.float32] = (values * self.temperature).astype(np.float32)
        self._check(~np.isfinite(logits).all(-1), first, values, "holds values too large for float32")
        return logits

    def _sums_to_one(self, sums: Array) -> Array:
        close: Array = np.abs(sums - 1) <= self._tolerance
        return close

    def _check_sums(self, sums: Array, first: int, values: Array) -> None:
        bad = np.argwhere(~self._sums_to_one(sums))
        if len(bad):
            row, view = bad[0]
            raise DataError(
                f"{self._what}: the probabilities of {self._place(first + row, view, values)} sum to "
                f"{sums[row, view]:.4g}, not to 1: pass another `kind`, one of {', '.join(KINDS)}"
            )

    def _check(self, bad: Any, first: int, values: Array, fault: str) -> None:
        if bad.any():
            row, view = np.argwhere(bad)[0]
            raise DataError(
                f"{self._what} {fault}, first at {self._place(first + row, view, values)}: correct the network that "
                "computed them, or pass another `kind`"
            )

    def _place(self, row: int, view: int, values: Array) -> str:
        return f"row {row}" + (f", view {view}" if values.shape[1] > 1 else "")
