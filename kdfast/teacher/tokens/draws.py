"""Rows of classes that were drawn at random, as they are stored: each class once, with its share of the weights."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdfast.errors import DataError, ShapeError
from kdfast.ops.kd_loss.offline import from_samples
from kdfast.teacher.tokens.sequence import Array, Rows


def draw_rows(ids: Array, weights: Array | None, vocabulary: int) -> tuple[Rows, npt.NDArray[np.float32]]:
    """Return the rows of drawn classes (L, s), and the log of each position's mean weight, -inf without a draw.

    Raises:
        DataError: A shape does not fit, a class is not below the vocabulary, or a weight is negative or not finite.
    """
    try:
        teacher = from_samples(ids, 1.0, weights=weights, classes=vocabulary)
    except (IndexError, ShapeError, TypeError) as error:
        raise DataError(str(error)) from error
    drawn = ids >= 0
    mass = drawn.astype(np.float64) if weights is None else np.where(drawn, weights.astype(np.float64), 0)
    with np.errstate(divide="ignore"):
        mean = np.log(mass.sum(1) / np.maximum(drawn.sum(1), 1)).astype(np.float32)
    length, draws = ids.shape
    bounds = np.arange(length + 1) * draws
    return Rows(teacher.values.numpy().ravel(), teacher.classes.numpy().ravel(), bounds), mean
