"""Scores from the trajectory of training: forgetting, area under the margin, DUAL, memorization.

They are averaged over runs; a run counts for the samples it trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kdfast.dynamics.reader import Dynamics
from kdfast.errors import DataError, UsageError
from kdfast.prune.options import Option
from kdfast.prune.rules.base import FloatArray
from kdfast.prune.scores.base import ScoreInputs, ScoreResult, require_dynamics

FORGETTING_OPTIONS = {
    "never_learned": Option(
        "max",
        "score of a sample that was never correct: above all others (max, the paper), or 0 (zero)",
        choices=("max", "zero"),
    )
}
DUAL_OPTIONS = {
    "window": Option(10, "number of epochs per window", low=2, high=1e6, integer=True),
    "first": Option(30, "number of epochs to use, from the first on", low=2, high=1e6, integer=True),
}
MEMORIZATION_OPTIONS = {
    "epoch": Option(
        None, "number of epochs after which accuracy is measured; automatic: all", low=1, high=1e6, integer=True
    ),
    "measure": Option(
        "correct",
        "what to average: correctness (correct, the paper), or the label's probability (p_y), which has less noise",
        choices=("correct", "p_y"),
    ),
}


def average_over_runs(dynamics: Dynamics, of_run: Callable[[int], npt.NDArray[np.floating]]) -> FloatArray:
    """Average values over runs, each run for the samples it trained on.

    Args:
        dynamics: The dynamics.
        of_run: Return the values of a run, float (N,).

    Returns:
        float64 (N,).

    Raises:
        DataError: No run trained on some sample.
    """
    total, count = np.zeros(dynamics.n), np.zeros(dynamics.n)
    for run in range(dynamics.runs):
        trained = dynamics.mask(run)
        total[trained] += of_run(run)[trained]
        count += trained
    if not count.all():
        missing = np.flatnonzero(count == 0)
        raise DataError(
            f"no run of {dynamics.path} trained on {len(missing)} of {dynamics.n} samples (for example {missing[0]}); "
            "record again with kdfast dynamics: more runs, or a larger share of the training split per run"
        )
    return total / count


def forgetting(inputs: ScoreInputs) -> ScoreResult:
    """Number of epochs at which a sample is wrong that was correct one epoch earlier; mean over runs.

    Samples that were never correct were never forgotten either. The paper ranks them as forgotten infinitely often;
    here such a run counts E events, more than E epochs can hold. Several public implementations count 0, so that they
    are pruned first: `never_learned=zero`.

    Source:
        Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network Learning, ICLR 2019.
    """
    dynamics = require_dynamics(inputs, "forgetting")
    if dynamics.epochs < 2:
        raise UsageError(
            f"forgetting compares epochs, but {dynamics.path} has only one: record more with kdfast dynamics"
        )
    hardest = inputs.options["never_learned"] == "max"

    def events(run: int) -> FloatArray:
        correct = dynamics.correct(run)
        count: FloatArray = (correct[:-1] & ~correct[1:]).sum(axis=0).astype(np.float64)
        if hardest:
            count[~correct.any(axis=0)] = dynamics.epochs
        return count

    return ScoreResult(average_over_runs(dynamics, events))


def aum(inputs: ScoreInputs) -> ScoreResult:
    """Minus the area under the margin: the mean over epochs of (largest other logit - logit of the label).

    Source:
        Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking, NeurIPS 2020, equation 1.
        Zheng et al., Coverage-centric Coreset Selection for High Pruning Rates, ICLR 2023, divide it into strata.
    """
    dynamics = require_dynamics(inputs, "aum")
    return ScoreResult(average_over_runs(dynamics, lambda run: -dynamics.margin(run).mean(axis=0, dtype=np.float64)))


def dual(inputs: ScoreInputs) -> ScoreResult:
    """Mean over windows of std(p_y) * (1 - mean p_y), in the first epochs of training.

    Windows are all `window` consecutive epochs among the first `first`. The extra `mean_p` is the mean of p_y over the
    first `first` epochs, for the rule `dual`. The standard deviation has the divisor `window`; another divisor would
    scale all scores alike.

    Source:
        Cho et al., Lightweight Dataset Pruning without Full Training via Example Difficulty and Prediction
        Uncertainty, ICML 2025, section 4.2.
    """
    dynamics = require_dynamics(inputs, "dual")
    window = int(inputs.number("window"))
    first = min(int(inputs.number("first")), dynamics.epochs)
    if window > first:
        raise UsageError(
            f"dual needs {window} epochs for a window, but there are {first}: record more with kdfast dynamics, or "
            "lower the option window"
        )

    def uncertainty(run: int) -> FloatArray:
        p = dynamics.p_y(run)
        total = np.zeros(dynamics.n)
        for start in range(first - window + 1):
            part = p[start : start + window].astype(np.float64)
            total += part.std(axis=0) * (1 - part.mean(axis=0))
        return total / (first - window + 1)

    mean_p = average_over_runs(dynamics, lambda run: dynamics.p_y(run)[:first].mean(axis=0, dtype=np.float64))
    return ScoreResult(average_over_runs(dynamics, uncertainty), {"mean_p": mean_p}, {"first": first})


def memorization(inputs: ScoreInputs) -> ScoreResult:
    """Accuracy on a sample of the runs that trained on it, minus that of the runs that did not.

    P[h(x) = y | x in the run's subset] - P[h(x) = y | x not in it], estimated by the two means over runs. The extras
    `inside` and `outside` are these means, and `stderr` is the standard error of their difference: sqrt(p (1 - p) / m)
    on each side, with p = (k + 1) / (m + 2) for k hits in m runs, so that a few agreeing runs do not count as certain.
    With `measure=p_y` it is the standard deviation over the side's runs, or 1/2 for a single run, over sqrt(m).

    Source:
        Feldman and Zhang, What Neural Networks Memorize and Why, NeurIPS 2020, equation 1. They use 2,000 to 4,000
        runs on 70% of the data; with fewer runs, check the standard error.
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
        side.check_complete(name, dynamics)
    inside, outside = sides["inside"], sides["outside"]
    spread = np.sqrt(inside.variance(soft) + outside.variance(soft))
    extras = {"stderr": spread, "inside": inside.mean, "outside": outside.mean}
    return ScoreResult(inside.mean - outside.mean, extras, {"epoch": epoch})


class _RunningMean:
    """Mean of a value per sample over some of the runs, and the variance of that mean."""

    def __init__(self, n: int) -> None:
        self._count, self._sum, self._squares = np.zeros(n), np.zeros(n), np.zeros(n)

    def add(self, values: FloatArray, samples: npt.NDArray[np.bool_]) -> None:
        self._count += samples
        self._sum += values * samples
        self._squares += values**2 * samples

    def check_complete(self, side: str, dynamics: Dynamics) -> None:
        """Raise DataError unless every sample was counted."""
        if not self._count.all():
            missing = np.flatnonzero(self._count == 0)
            raise DataError(
                f"{len(missing)} of {dynamics.n} samples (for example {missing[0]}) were never {side} the subset that "
                f"one of the {dynamics.runs} runs of {dynamics.path} trained on: record again with kdfast "
                "dynamics: more runs, each of which trains on less than the whole training split, for example keep=0.7"
            )

    @property
    def mean(self) -> FloatArray:
        return self._sum / self._count

    def variance(self, soft: bool) -> FloatArray:
        """Return the variance of the mean, of probabilities (soft) or of hits."""
        m = self._count
        if not soft:
            p = (self._sum + 1) / (m + 2)
            return p * (1 - p) / m
        sample_variance = np.maximum(self._squares - self._sum**2 / m, 0) / np.maximum(m - 1, 1)
        return np.where(m > 1, sample_variance, 0.25) / m
