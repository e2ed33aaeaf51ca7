"""The memorization score: how much training on a sample itself raises the accuracy on it."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from kdfast.dynamics.reader import Dynamics
from kdfast.errors import DataError, UsageError
from kdfast.pruning.options import Option
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import ScoreInputs, ScoreResult, require_dynamics

OPTIONS = {
    "epoch": Option(
        None, "number of epochs after which accuracy is measured; automatic: all", low=1, high=1e6, integer=True
    ),
    "measure": Option(
        "correct",
        "what to average: correctness (correct, the paper), or the label's probability (p_y), which has less noise",
        choices=("correct", "p_y"),
    ),
}
_PAPER_KEEP = 0.7
_EXAMPLE_RUNS = (20, 64, 2000)


def memorization(inputs: ScoreInputs) -> ScoreResult:
    """Accuracy on a sample of the runs that trained on it, minus that of the runs that did not.

    P[h(x) = y | x in the run's subset] - P[h(x) = y | x not in it], estimated by the two means over runs. The extras
    `inside` and `outside` are these means, and `stderr` is the standard error of their difference: sqrt(p (1 - p) / m)
    on each side, with p = (k + 1) / (m + 2) for k hits in m runs, so that a few agreeing runs do not count as certain.
    With `measure=p_y` it is the standard deviation over the side's runs, or 1/2 for a single run, over sqrt(m).

    Source:
        Feldman and Zhang, What Neural Networks Memorize and Why, NeurIPS 2020, equation 1. They use 2,000 to 4,000
        runs on 70% of the data; `memorization_stderr` tells what fewer runs cost.
    """
    dynamics = require_dynamics(inputs, "memorization")
    asked = inputs.options["epoch"]
    epoch = dynamics.epochs if asked is None else int(asked)
    if epoch > dynamics.epochs:
        raise UsageError(f"{dynamics.path} has {dynamics.epochs} epochs, not {epoch}: choose an earlier epoch")
    soft = inputs.options["measure"] == "p_y"
    sides = {name: _RunningMean(dynamics.n) for name in ("inside", "outside")}
    for run in range(dynamics.runs):
        hits = (dynamics.p_y(run) if soft else dynamics.correct(run))[epoch - 1].astype(np.float64)
        trained = dynamics.mask(run)
        sides["inside"].add(hits, trained)
        sides["outside"].add(hits, ~trained)
    for name, side in sides.items():
        if not side.complete:
            raise DataError(_describe_missing(name, side, dynamics))
    inside, outside = sides["inside"], sides["outside"]
    spread = np.sqrt(inside.variance(soft) + outside.variance(soft))
    extras = {"stderr": spread, "inside": inside.mean, "outside": outside.mean}
    return ScoreResult(inside.mean - outside.mean, extras, {"epoch": epoch})


def memorization_stderr(runs: int, keep: float) -> float:
    """Return the largest standard error that a memorization score by correctness can have.

    It is that of a sample on which half of the runs of either side are correct: sqrt(1 / (4 keep R) +
    1 / (4 (1 - keep) R)). Half of it takes four times as many runs.

    Args:
        runs: Number of runs, R.
        keep: Share of the training split that each run trains on, in (0, 1).

    Raises:
        UsageError: `runs` is below 1, or `keep` is not between 0 and 1.
    """
    if runs < 1:
        raise UsageError(f"`runs` is {runs}: pass at least 1")
    if not 0 < keep < 1:
        raise UsageError(f"`keep` is {keep}: pass a number between 0 and 1, for example {_PAPER_KEEP}")
    return 0.5 / math.sqrt(runs * keep * (1 - keep))


class _RunningMean:
    """Mean of a value per sample over some of the runs, and the variance of that mean."""

    def __init__(self, n: int) -> None:
        self.count = np.zeros(n)
        self._sum, self._squares = np.zeros(n), np.zeros(n)

    def add(self, values: FloatArray, samples: npt.NDArray[np.bool_]) -> None:
        self.count += samples
        self._sum += values * samples
        self._squares += values**2 * samples

    @property
    def complete(self) -> bool:
        """Whether every sample was counted."""
        return bool(self.count.all())

    @property
    def mean(self) -> FloatArray:
        return self._sum / self.count

    def variance(self, soft: bool) -> FloatArray:
        """Return the variance of the mean, of probabilities (soft) or of hits."""
        m = self.count
        if not soft:
            p = (self._sum + 1) / (m + 2)
            return p * (1 - p) / m
        sample_variance = np.maximum(self._squares - self._sum**2 / m, 0) / np.maximum(m - 1, 1)
        return np.where(m > 1, sample_variance, 0.25) / m


def _describe_missing(side: str, found: _RunningMean, dynamics: Dynamics) -> str:
    """Return the message about samples that are on one side of no run."""
    missing = np.flatnonzero(found.count == 0)
    errors = ", ".join(f"{memorization_stderr(runs, _PAPER_KEEP):.2g} with {runs} runs" for runs in _EXAMPLE_RUNS)
    return (
        f"{len(missing)} of {dynamics.n} samples (for example {missing[0]}) were never {side} the subset that one of "
        f"the {dynamics.runs} runs of {dynamics.path} trained on: record again with kdfast dynamics, at least "
        f"{_EXAMPLE_RUNS[0]} runs, each of which trains on less than the whole training split, for example "
        f"keep={_PAPER_KEEP} (standard error of a score at most {errors})"
    )
