"""Scores: one number a training sample, higher = harder = kept first by the `hard` rule."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kdfast.data.counter import Purpose, hash64, unit
from kdfast.errors import UsageError


@dataclass(frozen=True)
class ScoreInputs:
    """What a score may be computed from.

    Attributes:
        labels: int64 (N,), the classes of the training split.
        seed: Seed of whatever the score draws.
    """

    labels: NDArray[np.int64]
    seed: int


def random_score(inputs: ScoreInputs) -> NDArray[np.float64]:
    """Independent uniform numbers: keeping the highest draws a random subset.

    A sample's number depends on the seed and its index alone, so subsets of growing size are nested.

    Args:
        inputs: Only the seed and the number of samples are used.

    Returns:
        float64 (N,) in [0, 1).
    """
    return unit(hash64(Purpose.SCORE, inputs.seed, np.arange(len(inputs.labels), dtype=np.int64)))


SCORES: dict[str, Callable[[ScoreInputs], NDArray[np.float64]]] = {"random": random_score}


def score(method: str, inputs: ScoreInputs) -> NDArray[np.float64]:
    """Compute one score by name.

    Args:
        method: A key of `SCORES`.
        inputs: What it is computed from.

    Returns:
        float64 (N,), higher = harder.

    Raises:
        UsageError: If there is no such method; the nearest name is suggested.
    """
    if method not in SCORES:
        near = difflib.get_close_matches(method, SCORES, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"no pruning method is named {method!r}: {hint}known: {', '.join(SCORES)}")
    return SCORES[method](inputs)
