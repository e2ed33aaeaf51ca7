"""Refuse values that may be no scores, or may mean the opposite: each message names the two readings."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError, UsageError

Array = npt.NDArray[Any]
FloatArray = npt.NDArray[np.float64]

HIGHER = ("hard", "easy")

# Quantities that are high for easy samples, by the words in the names of keys and files.
_EASY = frozenset({"aum", "margin", "margins", "confidence", "correctness", "accuracy", "quality"})
_RANKING = "mask"  # DUAL and TDDS write the indices sorted by a score as *_mask.npy
_ENOUGH_TO_BE_SORTED = 10  # fewer values may be in order by chance


def choose_higher(higher: str | None, name: str) -> str:
    """Return which end of the scores is high: "hard" or "easy".

    Args:
        higher: What the caller says; None: not said, which means hard unless the name is that of an easiness.
        name: The key of the scores, or the name of their file.

    Raises:
        UsageError: It is none of them, or is not said for scores whose name is that of an easiness.
    """
    if higher is not None and higher not in HIGHER:
        raise UsageError(f"`higher` is {higher!r}: pass one of {', '.join(HIGHER)}")
    easy = sorted(_EASY & set(re.split(r"[^a-z]+", name.lower())))
    if higher is None and easy:
        raise UsageError(
            f"{name}: a higher {easy[0]} means an easier sample in most programs, and a harder one in kdfast: pass "
            "`higher` easy or hard"
        )
    return higher or "hard"


def check_kind(values: Array, what: str, n: int) -> None:
    """Check that an array holds one number for each sample, and is neither a mask nor the labels.

    Raises:
        DataError: It does not.
    """
    if values.dtype == np.bool_:
        raise DataError(
            f"{what} is a boolean mask {values.shape}, not scores: pass it as the `subset` of kdfast distill"
        )
    if values.ndim != 1 or values.dtype.kind not in "fiu":
        raise DataError(f"{what} is {values.dtype} {values.shape}: write one number for each of {n} samples, ({n},)")
    if not len(values):
        raise DataError(f"{what} is empty: write one number for each of {n} samples")


def check_finite(values: FloatArray, rows: IntArray, what: str) -> None:
    """Check that values (n,), of the samples `rows`, are finite.

    Raises:
        DataError: One is not; the message names its sample.
    """
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        raise DataError(
            f"{what} has {len(bad)} scores that are not finite, such as {values[bad[0]]} of sample {rows[bad[0]]}: "
            "correct them"
        )


def read_in_order(values: Array, what: str, name: str, labels: IntArray | None) -> tuple[FloatArray, bool]:
    """Return the score of each sample from values (n,) in a file that does not say which samples they are about.

    Args:
        values: The values.
        what: The file and the key, for messages.
        name: The name of the file; `mask` in it says that the values are indices, sorted by a score.
        labels: The class of each sample, or None.

    Returns:
        The scores, and whether the values are indices, sorted from the lowest score to the highest.

    Raises:
        DataError: The values may be scores, or something else.
    """
    n = len(values)
    if n > 2 and np.isin(values, (0, 1)).all() and values.dtype.kind in "iu":
        raise DataError(
            f"{what} holds only 0 and 1: either a mask of the samples to keep, for the `subset` of kdfast distill, or "
            "scores; for scores, write scores.astype(float)"
        )
    if labels is not None and n > 2 and np.array_equal(values, labels):
        raise DataError(f"{what} holds the labels of the data: choose the scores with `key`, or write them alone")
    if values.dtype.kind in "iu" and n > 1 and np.array_equal(np.sort(values), np.arange(n)):
        if _RANKING in name:
            ranks = np.empty(n, np.float64)
            ranks[values] = np.arange(n)
            return ranks, True
        raise DataError(
            f"{what} holds each of 0 to {n - 1} once: either the samples sorted by a score, lowest first, or the rank "
            "of each sample; for sorted samples, name the file *_mask.npy, and for ranks write ranks.astype(float)"
        )
    steps = np.diff(values.astype(np.float64))
    if n >= _ENOUGH_TO_BE_SORTED and steps.any() and ((steps >= 0).all() or (steps <= 0).all()):
        raise DataError(
            f"{what} holds sorted values: either scores that were sorted apart from their samples, as TDDS writes them "
            "(pass the indices beside them, *mask*.npy), or scores in the order of the samples; for these, write a "
            ".csv file with the columns index and score"
        )
    return values.astype(np.float64), False
