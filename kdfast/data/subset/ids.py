"""Check the indices of a subset, and tell them from masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.errors import SubsetError

_LARGEST = np.iinfo(np.int64).max


def check_ids(ids: npt.NDArray[Any], what: str, n: int | None = None) -> IntArray:
    """Return indices as int64 (k,), in native byte order and in their order.

    Args:
        ids: Distinct integers (k,), not negative, of any integer dtype.
        what: What they are, for messages.
        n: Number of samples, for messages; None: not known.

    Raises:
        SubsetError: They are none, or may be a mask.
    """
    if ids.dtype == np.bool_:
        raise SubsetError(f"{what} is a boolean mask {ids.shape}, not indices: use np.flatnonzero(mask)")
    if ids.dtype.kind in "iuf" and ids.size > 2 and np.isin(ids, (0, 1)).all():
        raise SubsetError(_describe_zeros_and_ones(ids, what, n))
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise SubsetError(
            f"{what} is {ids.dtype} {ids.shape}: must be one-dimensional integers; use ids.ravel().astype(np.int64)"
        )
    if not len(ids):
        raise SubsetError(f"{what} is empty: keep at least one sample")
    if int(ids.max()) > _LARGEST:
        raise SubsetError(f"{what} has indices past the end, such as {ids.max()}: correct them")
    ids = ids.astype(np.int64, copy=False)
    if ids.min() < 0:
        raise SubsetError(f"{what} has negative indices, such as {ids.min()}: count from 0, the first sample")
    values, counts = np.unique(ids, return_counts=True)
    if len(values) < len(ids):
        raise SubsetError(
            f"{what} repeats {len(ids) - len(values)} indices, such as {values[counts.argmax()]}: use np.unique(ids)"
        )
    return ids


def mask_to_ids(mask: npt.NDArray[np.bool_], what: str, n: int) -> IntArray:
    """Return the indices that a boolean mask (n,) keeps, int64 (k,), ascending.

    Raises:
        SubsetError: The mask has another shape, or keeps no sample.
    """
    if mask.shape != (n,):
        raise SubsetError(f"{what} is a boolean mask {mask.shape}, and the data has {n} training samples: pass ({n},)")
    if not mask.any():
        raise SubsetError(f"{what} is a boolean mask that keeps no sample: set at least one value to True")
    return np.flatnonzero(mask).astype(np.int64, copy=False)


def check_range(ids: IntArray, what: str, n: int) -> None:
    """Check that indices (k,), which are not negative, are those of n samples.

    Raises:
        SubsetError: One is too large.
    """
    if ids.max() >= n:
        raise SubsetError(
            f"{what} has indices past the end, such as {ids.max()}: the data has {n} training samples, 0 to {n - 1}"
        )


def _describe_zeros_and_ones(ids: npt.NDArray[Any], what: str, n: int | None) -> str:
    of = "" if n is None else f" of all {n} samples" if ids.shape == (n,) else f", but not of these {n} samples"
    return (
        f"{what} holds only 0 and 1 ({ids.dtype} {ids.shape}): either a mask{of}, or indices, which then repeat; for a "
        "mask, use mask.astype(bool)"
    )
