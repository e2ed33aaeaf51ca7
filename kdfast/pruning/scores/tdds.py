"""TDDS: how unevenly a sample's predictions change from epoch to epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.dynamics.reader import Dynamics
from kdfast.pruning.options import Option
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import ScoreInputs, ScoreResult, require_dynamics
from kdfast.pruning.scores.trajectory import average_by_blocks
from kdfast.pruning.scores.windows import check_window

OPTIONS = {
    "window": Option(10, "number of epochs per window", low=3, high=1e6, integer=True),
    "first": Option(
        30, "number of epochs to use, from the first on; the paper uses fewer for smaller subsets", 3, 1e6, integer=True
    ),
    "decay": Option(0.9, "weight of each new window in the moving average over windows", low=1e-6, high=1),
    "fidelity": Option(
        "paper",
        "change between two epochs: KL divergence (paper), or the sum of its terms' absolute values (public code)",
        choices=("paper", "code"),
    ),
}
_EPSILON = 1e-8  # added to probabilities inside logarithms, as in the public code
_BLOCK_ELEMENTS = 1 << 22  # float64 elements of a block's dense predictions


def tdds(inputs: ScoreInputs) -> ScoreResult:
    """Temporal dual-depth score: the deviation, within windows of epochs, of how much a prediction changes per epoch.

    The change from epoch t to t + 1 is KL(p_(t+1) || p_t). A window of J epochs has J - 1 changes; its value is the
    norm of their deviations from their mean. The score is the moving average R <- decay * value + (1 - decay) * R over
    all windows of the first `first` epochs, from R = 0. With decay .9, the last windows decide.

    Predictions are the recorded k largest probabilities. A class that is among them in only one of two epochs is taken
    to be among the next k in the other, where probabilities fall geometrically from the k-th and add up to the rest;
    all further classes share evenly what is left. This is exact for k = C. The public code reads predictions during
    training, on augmented images; dynamics hold those after each epoch, without augmentation.

    Source:
        Zhang et al., Spanning Training Progress: Temporal Dual-Depth Scoring (TDDS) for Enhanced Dataset Pruning, CVPR
        2024. Window, decay and 1e-8 as in its public code, the first 30 epochs as in the example there.
    """
    dynamics = require_dynamics(inputs, "tdds")
    window, decay = int(inputs.number("window")), inputs.number("decay")
    first = min(int(inputs.number("first")), dynamics.epochs)
    check_window("tdds", window, first)
    absolute = inputs.options["fidelity"] == "code"

    def deviation(run: int, samples: slice) -> FloatArray:
        changes = _prediction_changes(dynamics, run, samples, first, absolute)
        average = np.zeros(changes.shape[1])
        for start in range(first - window + 1):
            part = changes[start : start + window - 1]
            average = decay * np.linalg.norm(part - part.mean(axis=0), axis=0) + (1 - decay) * average
        return average

    return ScoreResult(average_by_blocks(dynamics, deviation), used={"first": first})


def _prediction_changes(dynamics: Dynamics, run: int, samples: slice, epochs: int, absolute: bool) -> FloatArray:
    """Return the change of each sample's prediction between consecutive epochs, float64 (epochs - 1, n)."""
    ids, p = dynamics.top(run, 0)
    changes = np.empty((epochs - 1, len(ids[samples])))
    for epoch in range(1, epochs):
        ids_after, p_after = dynamics.top(run, epoch)
        changes[epoch - 1] = compute_changes(
            ids[samples], p[samples], ids_after[samples], p_after[samples], dynamics.classes, absolute
        )
        ids, p = ids_after, p_after
    return changes


def compute_changes(
    ids_before: npt.NDArray[Any],
    p_before: npt.NDArray[np.float16],
    ids_after: npt.NDArray[Any],
    p_after: npt.NDArray[np.float16],
    classes: int,
    absolute: bool,
) -> FloatArray:
    """Return how much each prediction changed, from the k largest probabilities before and after.

    Args:
        ids_before: Classes, integers (N, k), the most probable first.
        p_before: Their probabilities, (N, k).
        ids_after: As `ids_before`, later.
        p_after: As `p_before`, later.
        classes: Number of classes, C.
        absolute: Sum the absolute values of the divergence's terms.

    Returns:
        KL(after || before), float64 (N,), with 1e-8 added to probabilities inside logarithms.
    """
    changes = np.empty(len(p_before))
    rows = min(max(_BLOCK_ELEMENTS // classes, 1), len(changes))
    table = np.full((rows, classes), np.nan)
    for start in range(0, len(changes), rows):
        block = slice(start, start + rows)
        before = _Prediction(ids_before[block], p_before[block], classes)
        after = _Prediction(ids_after[block], p_after[block], classes)
        changes[block] = _sum_terms(before, after, classes, absolute, table[: len(after.p)])
    return changes


class _Prediction:
    """The k largest probabilities of a block of samples, and estimates of the others.

    Attributes:
        ids: int64 (B, k), classes.
        p: float64 (B, k), their probabilities.
    """

    def __init__(self, ids: npt.NDArray[Any], p: npt.NDArray[np.float16], classes: int) -> None:
        self.ids = ids.astype(np.int64)
        self.p = p.astype(np.float64)
        self._unknown = classes - p.shape[1]
        smallest = self.p[:, -1]
        # Rounded probabilities may add up to more or less than they should.
        self._rest = np.clip(1 - self.p.sum(axis=1), 0, self._unknown * smallest)
        near = min(p.shape[1], self._unknown)
        ratio = np.divide(self._rest, self._rest + smallest, out=np.zeros_like(smallest), where=smallest > 0)
        self._near = self._rest * (1 - ratio**near) / max(near, 1)

    def look_up(self, ids: IntArray, table: FloatArray) -> FloatArray:
        """Return the probabilities of classes if they are among the largest, else NaN; float64 (B, k).

        Args:
            ids: int64 (B, k), classes.
            table: float64 (B, C) of NaN; left as it was.
        """
        np.put_along_axis(table, self.ids, self.p, axis=1)
        found: FloatArray = np.take_along_axis(table, ids, axis=1)
        np.put_along_axis(table, self.ids, np.nan, axis=1)
        return found

    def estimate(self, near: IntArray) -> tuple[FloatArray, FloatArray]:
        """Estimate the probabilities of the classes that are not among the largest.

        Args:
            near: int64 (B,), how many of them are among the largest of the other epoch.

        Returns:
            The probability of each of these and of each further class, float64 (B, 1) each.
        """
        far = self._unknown - near
        of_near = np.where(far > 0, self._near, self._rest / np.maximum(near, 1))
        of_far = np.maximum(self._rest - near * of_near, 0) / np.maximum(far, 1)
        return of_near[:, None], of_far[:, None]


def _sum_terms(before: _Prediction, after: _Prediction, classes: int, absolute: bool, table: FloatArray) -> FloatArray:
    """Return the sum of the divergence's terms over all classes: largest after, largest only before, and neither."""

    def terms(p: FloatArray, q: FloatArray) -> FloatArray:
        values: FloatArray = p * (np.log(p + _EPSILON) - np.log(q + _EPSILON))
        return np.abs(values, out=values) if absolute else values

    found = before.look_up(after.ids, table)
    only_before = np.isnan(after.look_up(before.ids, table))
    # Both have k classes, so as many are only in the one as only in the other.
    near = only_before.sum(axis=1)
    (near_before, far_before), (near_after, far_after) = before.estimate(near), after.estimate(near)
    total: FloatArray = terms(after.p, np.where(np.isnan(found), near_before, found)).sum(axis=1)
    total += (terms(near_after, before.p) * only_before).sum(axis=1)
    total += (classes - after.p.shape[1] - near) * terms(far_after, far_before)[:, 0]
    return total
