"""Convert what callers pass to the arrays that kdfast computes with, or say what to pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError
from kdfast.files.arrays import release_pages, row_blocks


@runtime_checkable
class SupportsDetach(Protocol):
    """A tensor, without an import of torch."""

    def detach(self) -> Any:
        """Return the tensor without its gradient."""


# Counts of samples per class are arrays of this length at most.
_MAX_CLASSES = 10_000_000
_BLOCK_NUMBERS = 1 << 18  # read at a time, few enough for a processor's cache
_GROUP_BYTES = 1 << 27  # rows of several groups that are read together
_GATHERED = 16  # blocks of them between two releases of pages


def as_labels(labels: npt.ArrayLike) -> IntArray:
    """Return labels as int64 (N,), contiguous and in native byte order.

    Args:
        labels: Integers (N,), classes from 0 on; an array, a CPU tensor or a list.

    Raises:
        DataError: They are not integers, not one-dimensional, empty, or negative or too large.
    """
    array = as_array(labels, "`labels`", "one class per sample")
    if array.ndim != 1 or array.dtype.kind not in "iu" or not len(array):
        raise DataError(
            f"`labels` are {array.dtype} of shape {array.shape}: pass integers (N,), one class per sample, from 0 on"
        )
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= _MAX_CLASSES:
        raise DataError(f"`labels` go from {low} to {high}: number the classes 0, 1, 2, ...")
    return np.ascontiguousarray(array, np.int64)


def as_values(values: npt.ArrayLike, n: int | None, what: str) -> npt.NDArray[np.float64]:
    """Return one number per sample as float64 (N,), contiguous and in native byte order.

    Args:
        values: Real numbers (N,).
        n: Number of samples; None: any.
        what: What the values are, for messages.

    Raises:
        DataError: There is not one finite real number per sample.
    """
    wanted = f"finite numbers ({'N' if n is None else n},), one per sample"
    array = as_array(values, what, wanted)
    if array.ndim != 1 or len(array) != (len(array) if n is None else n) or array.dtype.kind not in "fiu":
        raise DataError(f"{what} are {array.dtype} of shape {array.shape}: pass {wanted}")
    array = np.ascontiguousarray(array, np.float64)
    if not np.isfinite(array).all():
        bad = int((~np.isfinite(array)).sum())
        raise DataError(f"{bad} of {len(array)} {what} are not finite: correct them, or remove these samples")
    return array


def as_matrix(values: npt.ArrayLike, n: int, what: str) -> npt.NDArray[np.float32]:
    """Return one row per sample as float32 (N, D); memory-mapped float32 values stay mapped.

    Args:
        values: Real numbers (N, D).
        n: Number of samples.
        what: What the values are, for messages.

    Raises:
        DataError: There is not one row of real numbers per sample, or some are not finite in float32.
    """
    array = as_array(values, what, f"({n}, D), one row per sample")
    if array.ndim != 2 or len(array) != n or not array.shape[1] or array.dtype.kind not in "fiu":
        raise DataError(
            f"{what} are {array.dtype} of shape {array.shape} for {n} samples: pass ({n}, D), one row of numbers per "
            "sample, as a teacher's cache of this data holds"
        )
    with np.errstate(over="ignore"):
        array = np.ascontiguousarray(array, np.float32)
    bad = sum(_count_nonfinite(block) for _, block in row_blocks(array, rows_of(array)))
    if bad:
        raise DataError(
            f"{what} of {bad} samples are not finite in float32: correct them, or build the teacher's cache again"
        )
    return array


def rows_of(matrix: npt.NDArray[Any]) -> int:
    """Return how many rows of a matrix (N, D) to read at a time."""
    return max(1, _BLOCK_NUMBERS // int(matrix.shape[1]))


def group_by_class(labels: IntArray) -> dict[int, IntArray]:
    """Return the positions of each class that has samples, int64 and ascending, by ascending class."""
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    return dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=True))


def gather_groups(matrix: npt.NDArray[np.float32], groups: Sequence[IntArray]) -> Iterator[npt.NDArray[np.float32]]:
    """Yield the rows of each group, (n, D).

    Several groups are read together, in the order of the file, because their rows may lie anywhere in a file that is
    larger than the memory.

    Args:
        matrix: (N, D); pages of a file mapped read-only are released.
        groups: int64 (n,), ascending positions.
    """
    limit = max(1, _GROUP_BYTES // (matrix.itemsize * matrix.shape[1]))
    first = 0
    while first < len(groups):
        last, count = first + 1, len(groups[first])
        while last < len(groups) and count + len(groups[last]) <= limit:
            count += len(groups[last])
            last += 1
        together = np.sort(np.concatenate(groups[first:last]))
        rows = np.empty((len(together), matrix.shape[1]), matrix.dtype)
        step = _GATHERED * rows_of(matrix)
        for start in range(0, len(together), step):
            rows[start : start + step] = matrix[together[start : start + step]]
            release_pages(matrix)
        for group in groups[first:last]:
            yield rows[np.searchsorted(together, group)]
        first = last


def gather_rows(matrix: npt.NDArray[np.float32], samples: IntArray) -> npt.NDArray[np.float32]:
    """Return the rows of some samples, int64 (n,) and ascending, as `gather_groups` reads them."""
    return next(gather_groups(matrix, [samples]))


def _count_nonfinite(block: npt.NDArray[np.float32]) -> int:
    """Return how many rows have a number that is not finite."""
    finite = np.isfinite(block)
    return 0 if finite.all() else int((~finite).any(axis=1).sum())


def as_array(values: npt.ArrayLike, what: str, wanted: str) -> npt.NDArray[Any]:
    """Return an array, a tensor on any device, a list or a number as an array of any shape and dtype.

    Args:
        values: The values.
        what: What the values are, for messages.
        wanted: What to pass, for messages.

    Raises:
        DataError: It is none of these, or a masked array, a sparse tensor or a list of rows of different lengths.
    """
    if isinstance(values, np.ma.MaskedArray):
        raise DataError(f"{what} are a masked array: pass {wanted}, without a mask")
    try:
        if isinstance(values, SupportsDetach):
            values = values.detach().cpu()
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
        raise DataError(f"{what} are not an array ({error}): pass {wanted}") from error
