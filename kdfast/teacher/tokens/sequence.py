"""What a teacher says about the tokens of a text: for each position, some classes with their log-probabilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.errors import DataError
from kdfast.ops.kd_loss.offline import SMALLEST_REST, is_feasible

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

UNKNOWN = -1
"""Label of a position whose token is not known."""

NO_TEXTS = "there are no texts: add at least one"

_NEVER = -9999.0  # servers write it in place of -inf, which JSON does not have


@dataclass(frozen=True)
class Rows:
    """Rows of different lengths, before they are checked.

    Attributes:
        values: (E,) natural log-probabilities; -inf for entries to leave out.
        ids: (E,) their classes.
        offsets: (L + 1,): position i has the entries from ``offsets[i]`` to ``offsets[i + 1]``.
        labels: (L,) the tokens of the text, `UNKNOWN` where not known; or None.
        tops: (L,) how many entries of each position are the most probable classes; None: all.
        sequence: Number of the text; None: not given.
        failed: Whether the request of the text failed, so that there are no positions.
    """

    values: Array
    ids: Array
    offsets: Array
    labels: Array | None = None
    tops: Array | None = None
    sequence: int | None = None
    failed: bool = False


@dataclass(frozen=True)
class Sequence:
    """Checked rows of a text of L tokens, with E entries: within a position, most probable class first, each once.

    Attributes:
        values: float32 (E,) log-probabilities.
        ids: int64 (E,) classes.
        counts: int64 (L,) entries of each position; 0: the teacher says nothing there.
        ranks: int64 (L,) how many of them, from the first on, are the most probable classes.
        tail: float32 (L,) log-mass of the classes left out.
        labels: int64 (L,) the tokens of the text; `UNKNOWN` where not known.
    """

    values: npt.NDArray[np.float32]
    ids: Ints
    counts: Ints
    ranks: Ints
    tail: npt.NDArray[np.float32]
    labels: Ints


_NO_INTS = np.zeros(0, np.int64)
_NOTHING = Sequence(np.zeros(0, np.float32), _NO_INTS, _NO_INTS, _NO_INTS, np.zeros(0, np.float32), _NO_INTS)


def failed_rows(sequence: int | None) -> Rows:
    """Return the rows of a text whose request failed."""
    return Rows(np.zeros(0), _NO_INTS, np.zeros(1, np.int64), sequence=sequence, failed=True)


class TextCheck:
    """Checks texts one after another, and that either all or none have a number, each its own.

    Args:
        vocabulary: Number of the teacher's tokens.

    Attributes:
        is_numbered: Whether the texts have numbers; None before the first.
        numbers: Their numbers.
    """

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary
        self.is_numbered: bool | None = None
        self.numbers: set[int] = set()

    def __call__(self, rows: Rows) -> Sequence:
        """Return the checked rows of the next text.

        Raises:
            DataError: Something does not fit; the message names the position.
        """
        text, number = _NOTHING if rows.failed else check_rows(rows, self._vocabulary), rows.sequence
        if self.is_numbered is None:
            self.is_numbered = number is not None
        elif self.is_numbered != (number is not None):
            raise DataError("some texts have a number and others have none: give all of them one, or none")
        if number is not None:
            if not 0 <= number < 2**63:
                raise DataError(f"the number of the text is {number}: must not be negative, and fit into int64")
            if number in self.numbers:
                raise DataError(f"the number of the text is {number}, which another text has: give each its own")
            self.numbers.add(number)
        return text


def check_rows(rows: Rows, vocabulary: int) -> Sequence:
    """Check the rows of a text.

    Raises:
        DataError: A shape does not fit, an id is out of range, or a number is no log-probability; the message names
            the position.
    """
    values, ids, offsets = _check_shapes(rows)
    length = len(offsets) - 1
    position = np.repeat(np.arange(length), np.diff(offsets))
    slack = 2e-2 if rows.values.dtype.itemsize <= 2 else 1e-3
    _refuse(~(values <= slack), position, values, "the log-probability {}: they are at most 0")
    used = values > _NEVER
    _refuse(used & ((ids < 0) | (ids >= vocabulary)), position, ids, f"the class {{}}: must be in [0, {vocabulary})")
    values, ids, position = values[used], ids[used], position[used]
    # By position, then from the most probable class down; of a repeated class, the first entry counts.
    first = np.sort(np.unique(position * np.int64(vocabulary) + ids, return_index=True)[1])
    values, ids, position = values[first], ids[first], position[first]
    order = np.lexsort((-values, position))
    values, ids, position = values[order], ids[order], position[order]
    counts = np.bincount(position, minlength=length).astype(np.int64)
    mass = np.bincount(position, np.exp(values), minlength=length)
    if (mass > 1 + slack).any():
        at = int(np.argmax(mass))
        raise DataError(f"position {at}: the probabilities sum to {mass[at]:.4g}, more than 1")
    with np.errstate(divide="ignore"):
        tail = np.log(np.where(counts >= vocabulary, 0, np.maximum(1 - mass, SMALLEST_REST)))
    ranks = counts if rows.tops is None else np.minimum(counts, _check_tops(rows.tops))
    _check_rest(values, counts, ranks, tail, vocabulary)
    labels = _check_labels(rows.labels, length, vocabulary)
    return Sequence(values.astype(np.float32), ids, counts, ranks, tail.astype(np.float32), labels)


def _check_shapes(rows: Rows) -> tuple[Floats, Ints, Ints]:
    if rows.values.dtype.kind != "f" or rows.ids.dtype.kind not in "iu" or rows.offsets.dtype.kind not in "iu":
        raise DataError(
            f"log-probabilities, classes and offsets are {rows.values.dtype}, {rows.ids.dtype} and "
            f"{rows.offsets.dtype}: must be floating-point numbers, integers and integers"
        )
    values, ids = rows.values.astype(np.float64), rows.ids.astype(np.int64)
    offsets = rows.offsets.astype(np.int64)
    if offsets.shape in ((0,), (1,)):
        raise DataError("the text has no tokens: leave it out")
    if values.ndim != 1 or ids.shape != values.shape or offsets.ndim != 1:
        raise DataError(
            f"log-probabilities, classes and offsets have shapes {values.shape}, {ids.shape} and {offsets.shape}: must "
            "be (E,), (E,) and (L + 1,)"
        )
    if offsets[0] != 0 or offsets[-1] != len(values) or (np.diff(offsets) < 0).any():
        raise DataError(f"offsets must begin with 0, never fall, and end with {len(values)}, the number of entries")
    return values, ids, offsets


def _check_tops(tops: Array) -> Ints:
    found = np.asarray(tops, np.int64)
    if (found < 0).any():
        raise DataError(
            f"`top_k` is {found.min()}: pass how many entries are the most probable classes, 0 if not known"
        )
    return found


def _check_rest(values: Floats, counts: Ints, ranks: Ints, tail: Floats, vocabulary: int) -> None:
    """Check that the classes left out can have their mass if none is more probable than the last of the top ones."""
    most, others = np.zeros(len(counts)), vocabulary - counts
    is_bounded = ranks > 0
    most[is_bounded] = values[(np.cumsum(counts) - counts + ranks - 1)[is_bounded]]
    bad = np.flatnonzero(~is_feasible(np.exp(tail), others * np.exp(most)) & (others > 0))
    if len(bad):
        at = bad[0]
        raise DataError(
            f"position {at}: {others[at]} other classes have the probability {np.exp(tail[at]):.3g}, more than if each "
            f"had that of the class of rank {ranks[at]}, {np.exp(most[at]):.3g}: check `vocabulary`, and pass `top_k`, "
            "how many of the entries are the most probable ones, if others were added"
        )


def _check_labels(labels: Array | None, length: int, vocabulary: int) -> Ints:
    if labels is None:
        return np.full(length, UNKNOWN, np.int64)
    if labels.shape != (length,) or labels.dtype.kind not in "iu":
        raise DataError(f"the tokens are {labels.dtype} of shape {labels.shape}: must be integers ({length},)")
    found = labels.astype(np.int64)
    bad = np.flatnonzero((found < UNKNOWN) & (found != -100) | (found >= vocabulary))
    if len(bad):
        raise DataError(f"position {bad[0]} has the token {found[bad[0]]}: must be in [0, {vocabulary})")
    return np.maximum(found, UNKNOWN)


def _refuse(bad: npt.NDArray[np.bool_], position: Ints, found: Array, fault: str) -> None:
    if bad.any():
        at = int(np.argmax(bad))
        raise DataError(f"position {position[at]} has {fault.format(f'{found[at]:.6g}')}")
