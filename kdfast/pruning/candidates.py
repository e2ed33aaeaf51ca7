"""The samples that a selection may keep: all of the training split, or those outside of another subset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import subset_size
from kdfast.errors import SubsetError

_Scalar = TypeVar("_Scalar", bound=np.generic)


@dataclass(frozen=True)
class Candidates:
    """The samples that may be kept, and how many of them to keep.

    Attributes:
        ids: int64 (n,), ascending indices into the training split.
        count: Samples to keep, at most n.
        fraction: Their share of the candidates.
        are_all: Whether these are all samples of the training split.
    """

    ids: IntArray
    count: int
    fraction: float
    are_all: bool

    def take(self, values: npt.NDArray[_Scalar]) -> npt.NDArray[_Scalar]:
        """Return the values (N, ...) of the candidates, (n, ...); not copied if these are all samples."""
        return values if self.are_all else values[self.ids]


def find_candidates(labels: IntArray, fraction: float, balance: str, exclude: IntArray | None = None) -> Candidates:
    """Return the samples that may be kept.

    Args:
        labels: int64 (N,), of the whole training split.
        fraction: Share of the whole training split to keep.
        balance: One of `kdfast.pruning.rules.class_budget.BALANCE`; only `unbalanced` allows a class without
            any.
        exclude: int64 (k,), distinct indices of samples that must not be kept; None: none.

    Raises:
        SubsetError: The fraction keeps no sample or more than there are candidates, or a class has no candidate.
    """
    n, count = len(labels), subset_size(len(labels), fraction)
    if exclude is None:
        return Candidates(np.arange(n, dtype=np.int64), count, fraction, are_all=True)
    ids = np.setdiff1d(np.arange(n, dtype=np.int64), exclude)
    if count > len(ids):
        raise SubsetError(
            f"`fraction` is {fraction:g}, {count} of {n} samples, and `exclude` leaves {len(ids)}: keep fewer, or "
            "exclude fewer"
        )
    missing = np.setdiff1d(labels, labels[ids])
    if len(missing) and balance != "unbalanced":
        raise SubsetError(
            f"`exclude` holds all samples of {len(missing)} classes, such as class {missing[0]}: exclude fewer, or "
            "pass `balance` unbalanced"
        )
    return Candidates(ids, count, count / len(ids), are_all=False)
