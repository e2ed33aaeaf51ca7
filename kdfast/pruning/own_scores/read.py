"""Read scores that another program wrote: choose the array, match it with the samples, and turn its hard end up."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.data.subset.paths import SamplePaths
from kdfast.errors import DataError, UsageError, did_you_mean
from kdfast.pruning.own_scores.formats import LOADERS, Found
from kdfast.pruning.own_scores.readings import check_finite, check_kind, choose_higher, read_in_order

FloatArray = npt.NDArray[np.float64]

_NAMES = ("score", "scores")
_ENDS = {"hard": "higher = harder", "easy": "higher = easier, so kdfast turns them round"}
_SORTED = "indices sorted by the score, lowest first"


@dataclass(frozen=True)
class OwnScores:
    """Scores of another program.

    Attributes:
        values: float64 (n,), in the order of the training split; higher = harder.
        name: The name of the file, and the key.
        parameters: How the file was read: which end is `higher`, as `read_as`, and the `key` if there is one.
    """

    values: FloatArray
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


def read_own_scores(
    path: Path,
    *,
    n: int,
    key: str | None = None,
    higher: str | None = None,
    files: Sequence[str] | None = None,
    labels: IntArray | None = None,
) -> OwnScores:
    """Read scores from a file whose suffix is one of `LOADERS`.

    Args:
        path: The file.
        n: Number of training samples of the data.
        key: Key of the scores among several arrays, "a.b" for nested dicts; or the column of a table.
        higher: "hard" or "easy": what a high score in the file means. None: hard.
        files: The path of each training sample, or None.
        labels: int64 (n,), the class of each sample, or None.

    Raises:
        DataError: The file is damaged, has no such array or not one finite number for each sample, or may be read in
            two ways.
        UsageError: `higher` is no such word, or is needed.
    """
    found = LOADERS[path.suffix.lower()](path)
    chosen = _choose_key(found, path, n, key)
    name = f"{path.name}:{chosen}" if chosen else path.name
    what = f"{path}, {chosen}," if chosen else str(path)
    values, by = found.arrays[chosen], found.by
    found, values = _leave_out_other_splits(found, values, n, files)
    check_kind(values, what, n)
    end = choose_higher(higher, chosen or path.name)
    if len(values) != n:
        raise DataError(f"{what} holds {len(values)} scores, this data has {n} training samples: score this data")
    rows = _find_samples(found, what, n, files)
    check_finite(values.astype(np.float64), rows, what)
    if found.rows is None:
        scores, is_sorted = read_in_order(values, what, path.stem, labels)
        by = _SORTED if is_sorted else by
    else:
        _check_is_no_label(values, rows, what, labels)
        scores = np.empty(n, np.float64)
        scores[rows] = values
    parameters = {"higher": end, "read_as": by} | ({"key": chosen} if chosen else {})
    return OwnScores(scores if end == "hard" else -scores, name, parameters)


def describe_scores(method: str, parameters: Mapping[str, Any]) -> str | None:
    """Return how a file of scores was read, for people; None for scores that kdfast computed.

    Args:
        method: The name of the scores.
        parameters: Their parameters.
    """
    if "read_as" not in parameters:
        return None
    return f"{method}: {parameters['read_as']}; {_ENDS[parameters['higher']]}"


def _choose_key(found: Found, path: Path, n: int, key: str | None) -> str:
    """Return the key of the scores among the arrays of a file."""
    arrays = found.arrays
    held = ", ".join(f"{name or 'one array'} {array.shape}" for name, array in list(arrays.items())[:20]) or "no array"
    if key is not None:
        if key not in arrays:
            known = [name for name in arrays if name]
            raise UsageError(f"{path} has no `key` {key!r}: {did_you_mean(key, known)}it holds {held}")
        return key
    if len(arrays) == 1:
        return next(iter(arrays))
    fitting = [name for name, array in arrays.items() if array.shape == (n,)]
    called = [name for name in fitting if name.rpartition(".")[2].lower() in _NAMES]
    if len(fitting) == 1 or len(called) == 1:
        return (called or fitting)[0]
    if not fitting:
        raise DataError(f"{path} holds {held}, and none has one number for each of {n} samples: score this data")
    raise UsageError(
        f"{path} holds {len(fitting)} arrays that may be the scores: pass one of {', '.join(fitting)} as `key`"
    )


def _leave_out_other_splits(
    found: Found, values: npt.NDArray[Any], n: int, files: Sequence[str] | None
) -> tuple[Found, npt.NDArray[Any]]:
    """Leave out the scores of further files, such as held-out ones, if each training sample has one of its own."""
    if isinstance(found.rows, list) and files is not None and len(values) == len(found.rows) > n:
        known = SamplePaths(files).covers(found.rows)
        if known is not None:
            kept = [path for path, is_known in zip(found.rows, known, strict=True) if is_known]
            return dataclasses.replace(found, rows=kept), values[np.array(known)]
    return found, values


def _find_samples(found: Found, what: str, n: int, files: Sequence[str] | None) -> IntArray:
    """Return the sample of each value, int64 (n,), each once."""
    if found.rows is None:
        return np.arange(n, dtype=np.int64)
    rows = found.rows
    if isinstance(rows, list):
        if files is None:
            raise DataError(
                f"{what} holds paths, such as {rows[0][:200]}, and the samples of this data are not files: write the "
                "index of each sample, 0 for the first"
            )
        rows = SamplePaths(files).find(rows, what)
    if rows.min() < 0 or rows.max() >= n:
        raise DataError(
            f"{what} has indices from {rows.min()} to {rows.max()}: the data has {n} training samples, 0 to {n - 1}"
        )
    counts = np.bincount(rows, minlength=n)
    if counts.max() > 1:
        raise DataError(
            f"{what} has {counts.max()} scores of sample {counts.argmax()} and none of sample {counts.argmin()}: write "
            "one score for each sample"
        )
    return rows


def _check_is_no_label(values: FloatArray, rows: IntArray, what: str, labels: IntArray | None) -> None:
    if labels is not None and len(values) > 2 and np.array_equal(values, labels[rows]):
        raise DataError(
            f"{what} has the label of each sample, not a score: a list of the samples to keep is the `subset` of "
            "kdfast distill; for scores, write a score behind each path"
        )
