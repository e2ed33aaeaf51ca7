"""Best window selection: keep the window of ranks on which a linear classifier learns all samples best."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError
from kdfast.pruning.options import Only, Option, OptionValue
from kdfast.pruning.rules.base import RuleInputs, by_rank, require_features

_WITHOUT_START = Only("without start", lambda options: options["start"] is None)
OPTIONS = {
    "start": Option(
        None, "share of the hardest samples to skip; automatic: that of the best window on all samples", low=0, high=1
    ),
    "step": Option(
        0.05, "distance of the windows to compare, as a share of the samples", low=1e-3, high=1, only=_WITHOUT_START
    ),
    "ridge": Option(
        1.0, "penalty on the squared weights of the linear classifier", low=1e-6, high=1e12, only=_WITHOUT_START
    ),
}
# Size of a block of float64 features or predictions.
_BLOCK_BYTES = 1 << 26


def select_window(inputs: RuleInputs) -> IntArray:
    """Keep `count` consecutive ranks of the group, from `start` of its samples on, the hardest first.

    Without class budgets there is one ranking; with them there is one for each class, and all classes have the same
    `start`.

    Source:
        Choi et al. 2024, BWS: best window selection based on sample scores for data pruning across broad ranges. The
        public code ranks by forgetting or EL2N, within classes, and takes the features from a network trained for 20
        epochs on a random subset of the same size. In the features of a teacher that fits its training set, nearly all
        windows are equally good.
    """
    order = by_rank(inputs.scores, inputs.ties)
    first = _first_rank(len(order), inputs.count, inputs.number("start"))
    return order[first : first + inputs.count]


def resolve_defaults(inputs: RuleInputs) -> dict[str, OptionValue]:
    """Return the start of the best window."""
    return {"start": best_start(inputs)}


def best_start(inputs: RuleInputs) -> float:
    """Return the start of the window whose ridge regression classifies most of all samples correctly.

    A window starts at 0, `step`, 2 `step`, ... of the samples. On its samples, the regression of the one-hot labels on
    the features and a constant minimizes the squared error plus `ridge` times the squared weights, in float64; its
    prediction is the class of the highest value. Of equally good windows, the hardest wins. The products of the
    features are summed once as a sample enters the window and once as it leaves, which takes 2 N D^2 multiplications
    for any number of windows.

    Args:
        inputs: All samples as one group.

    Raises:
        DataError: There are no labels, or the features are missing, not (n, D), or not finite.
    """
    starts = _starts(inputs.fraction, inputs.number("step"))
    if len(starts) == 1:
        return starts[0]
    if inputs.labels is None:
        raise DataError("rule 'bws' has no labels: pass `labels`, one class per sample")
    data = _Regression(require_features(inputs), inputs.labels, inputs.classes, torch.device(inputs.device))
    enters, leaves = _windows_of_samples(inputs, starts)
    weights = []
    for window in range(len(starts)):
        used = enters < leaves
        data.add(np.flatnonzero(used & (enters == window)), 1)
        data.add(np.flatnonzero(used & (leaves == window)), -1)
        weights.append(data.solve(inputs.number("ridge")))
    return starts[int(data.count_correct(torch.stack(weights)).argmax())]


def _starts(fraction: float, step: float) -> list[float]:
    # Rounding must not lose the last window, which ends at the easiest sample.
    number = math.floor((1 - fraction) / step + 1e-9) + 1
    return [round(window * step, 12) for window in range(number)]


def _first_rank(n: int, count: int, start: float) -> int:
    return min(round(start * n), n - count)


def _windows_of_samples(inputs: RuleInputs, starts: list[float]) -> tuple[IntArray, IntArray]:
    """Return the first window that contains each sample, and the first window after these; int64 (n,) each.

    A sample that lies between two windows has equal numbers.
    """
    n = len(inputs.scores)
    enters, leaves = np.empty(n, np.int64), np.empty(n, np.int64)
    order = by_rank(inputs.scores, inputs.ties)
    if inputs.budgets is None or inputs.labels is None:
        groups = [(order, inputs.count)]
    else:
        by_class = order[np.argsort(inputs.labels[order], kind="stable")]
        ends = np.cumsum(np.bincount(inputs.labels, minlength=len(inputs.budgets)))
        groups = list(zip(np.split(by_class, ends[:-1]), inputs.budgets.tolist(), strict=True))
    for ranked, count in groups:
        first = np.array([_first_rank(len(ranked), count, start) for start in starts])
        ranks = np.arange(len(ranked))
        enters[ranked] = np.searchsorted(first + count, ranks, side="right")
        leaves[ranked] = np.searchsorted(first, ranks, side="right")
    return enters, leaves


class _Regression:
    """Ridge regression of one-hot labels on features and a constant, on a changing set of the samples.

    Args:
        features: float32 (n, D).
        labels: int64 (n,).
        classes: Number of classes, C.
        device: Device to compute on.
    """

    def __init__(self, features: npt.NDArray[np.float32], labels: IntArray, classes: int, device: torch.device) -> None:
        self._features, self._labels, self._classes, self._device = features, labels, classes, device
        width = features.shape[1] + 1
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._moments = torch.zeros(width, classes, dtype=torch.float64, device=device)

    def add(self, rows: IntArray, sign: int) -> None:
        """Add samples to the set (sign 1), or remove them (sign -1)."""
        for x, labels in self._blocks(rows, len(self._gram) + self._classes):
            self._gram += sign * (x.T @ x)
            self._moments += sign * (x.T @ torch.nn.functional.one_hot(labels, self._classes).double())

    def solve(self, ridge: float) -> Tensor:
        """Return the weights that minimize the squared error plus `ridge` times the squared weights, (D + 1, C)."""
        # Rounding may make a singular matrix indefinite, or absorb a ridge that is small beside large features.
        values, vectors = torch.linalg.eigh(self._gram)
        weights: Tensor = vectors @ ((vectors.T @ self._moments) / (values.clamp(min=0) + ridge)[:, None])
        return weights

    def count_correct(self, weights: Tensor) -> Tensor:
        """Return for each of the weights (W, D + 1, C) how many of all samples they classify correctly, int64 (W,)."""
        number, width, classes = weights.shape
        flat = weights.permute(1, 0, 2).reshape(width, number * classes)
        correct = torch.zeros(number, dtype=torch.int64, device=self._device)
        for x, labels in self._blocks(np.arange(len(self._labels)), width + number * classes):
            predicted = (x @ flat).view(len(x), number, classes).argmax(2)
            correct += (predicted == labels[:, None]).sum(0)
        return correct

    def _blocks(self, rows: IntArray, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield features with a constant, float64 (b, D + 1), and labels, int64 (b,), of a few rows at a time."""
        step = max(1, _BLOCK_BYTES // (8 * width))
        for start in range(0, len(rows), step):
            part = rows[start : start + step]
            x = torch.from_numpy(self._features[part]).to(self._device).double()
            yield torch.cat((x.new_ones(len(x), 1), x), dim=1), torch.from_numpy(self._labels[part]).to(self._device)
