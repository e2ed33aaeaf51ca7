"""Scores from the course of training: forgetting, area under the margin, DUAL, memorization.

Several runs are averaged; a run counts for the samples that it trained on.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kdfast.dynamics.reader import Dynamics
from kdfast.errors import DataError, UsageError
from kdfast.prune.rules.base import FloatArray, Option
from kdfast.prune.scores.base import Scored, ScoreInputs, need_dynamics

MORE_RUNS = "record more runs: kdfast dynamics --keep 0.7 --runs R"

FORGETTING_OPTIONS = {
    "never_learned": Option(
        "max", "never correct: hardest of all (max, the paper) or no event at all (zero)", choices=("max", "zero")
    )
}
DUAL_OPTIONS = {
    "window": Option(10, "epochs in a window", low=2, high=1e6, whole=True),
    "first": Option(30, "how many of the first epochs to look at", low=2, high=1e6, whole=True),
}
MEMORIZATION_OPTIONS = {
    "epoch": Option(None, "after how many epochs; by default after all", low=1, high=1e6, whole=True),
    "measure": Option(
        "correct", "correct (the paper) or p_y, the probability of the class: less noise", choices=("correct", "p_y")
    ),
}


def mean_over_runs(dynamics: Dynamics, of_run: Callable[[int], npt.NDArray[np.floating]]) -> FloatArray:
    """Average float (N,) arrays over runs, each run for the samples it trained on; float64 (N,).

    Raises:
        DataError: If no run trained on some sample.
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
            "record more runs, or without --keep"
        )
    return total / count


def forgetting(inputs: ScoreInputs) -> Scored:
    """How often a sample was forgotten: epochs t where it is wrong and at t - 1 it was right; mean over runs.

    Samples that were never right were never forgotten either. The paper counts them as forgotten infinitely often;
    here such a run counts as E events, more than E epochs can hold. Several public codes give them 0, so that they are
    the first to be pruned: `never_learned=zero`.

    Source:
        Toneva et al., An Empirical Study of Example Forgetting during Deep Neural Network Learning, ICLR 2019.
    """
    dynamics = need_dynamics(inputs, "forgetting")
    if dynamics.epochs < 2:
        raise UsageError(f"forgetting compares epochs, and {dynamics.path} has one; record more with --epochs")
    hardest = inputs.options["never_learned"] == "max"

    def events(run: int) -> FloatArray:
        correct = dynamics.correct(run)
        count: FloatArray = (correct[:-1] & ~correct[1:]).sum(axis=0).astype(np.float64)
        if hardest:
            count[~correct.any(axis=0)] = dynamics.epochs
        return count

    return Scored(mean_over_runs(dynamics, events))


def aum(inputs: ScoreInputs) -> Scored:
    """Minus the area under the margin: the mean over epochs of (largest other logit - logit of the class).

    Source:
        Pleiss et al., Identifying Mislabeled Data using the Area Under the Margin Ranking, NeurIPS 2020, equation 1;
        as the hardness that Zheng et al., Coverage-centric Coreset Selection for High Pruning Rates, ICLR 2023, divide
        into strata.
    """
    dynamics = need_dynamics(inputs, "aum")
    return Scored(mean_over_runs(dynamics, lambda run: -dynamics.margin(run).mean(axis=0, dtype=np.float64)))


def dual(inputs: ScoreInputs) -> Scored:
    """Mean over windows of std(p_y) * (1 - mean p_y), in the first epochs of training.

    A window is `window` consecutive epochs, and one begins at each of the first `first` epochs that has room for it.
    The extra `mean_p` is the mean of p_y over those epochs, for the rule `dual`. The standard deviation has the divisor
    `window`; another would scale all scores alike.

    Source:
        Cho et al., Lightweight Dataset Pruning without Full Training via Example Difficulty and Prediction
        Uncertainty, ICML 2025, section 4.2.
    """
    dynamics = need_dynamics(inputs, "dual")
    window = int(inputs.number("window"))
    first = min(int(inputs.number("first")), dynamics.epochs)
    if window > first:
        raise UsageError(
            f"dual takes windows of {window} epochs, and there are {first}; record more with --epochs, or take "
            "--option window=N"
        )

    def uncertainty(run: int) -> FloatArray:
        p = dynamics.p_y(run)
        total = np.zeros(dynamics.n)
        for start in range(first - window + 1):
            part = p[start : start + window].astype(np.float64)
            total += part.std(axis=0) * (1 - part.mean(axis=0))
        return total / (first - window + 1)

    mean_p = mean_over_runs(dynamics, lambda run: dynamics.p_y(run)[:first].mean(axis=0, dtype=np.float64))
    return Scored(mean_over_runs(dynamics, uncertainty), {"mean_p": mean_p}, {"first": first})


def memorization(inputs: ScoreInputs) -> Scored:
    """How much more often a sample is classified right by runs that trained on it than by runs that did not.

    P[h(x) = y | x in the run's subset] - P[h(x) = y | not in it], estimated by the two means over runs. The extras
    `inside` and `outside` are these means, and `stderr` is the standard error of their difference: sqrt(p (1 - p) / m)
    on each side, with p = (k + 1) / (m + 2) for k hits in m runs, so that few runs that agree do not count as certainty
    (with `measure=p_y` the spread over the side's runs, or 1/2 where there is one).

    Source:
        Feldman and Zhang, What Neural Networks Memorize and Why, NeurIPS 2020, equation 1; there with 2,000 to 4,000
        runs on 70% of the data, so mind the standard error.
    """
    dynamics = need_dynamics(inputs, "memorization (of runs with --keep 0.7)")
    asked = inputs.options["epoch"]
    epoch = dynamics.epochs if asked is None else int(asked)
    if epoch > dynamics.epochs:
        raise UsageError(f"{dynamics.path} has {dynamics.epochs} epochs, not {epoch}; take an earlier one")
    soft = inputs.options["measure"] == "p_y"
    sides = {name: _Mean(dynamics.n) for name in ("inside", "outside")}
    for run in range(dynamics.runs):
        hits = (dynamics.p_y(run) if soft else dynamics.correct(run))[epoch - 1].astype(np.float64)
        trained = dynamics.mask(run)
        sides["inside"].add(hits, trained)
        sides["outside"].add(hits, ~trained)
    for name, side in sides.items():
        side.require(name, dynamics)
    inside, outside = sides["inside"], sides["outside"]
    spread = np.sqrt(inside.variance(soft) + outside.variance(soft))
    extras = {"stderr": spread, "inside": inside.mean, "outside": outside.mean}
    return Scored(inside.mean - outside.mean, extras, {"epoch": epoch})


class _Mean:
    """Mean of a number a sample over some of the runs, and the variance of that mean."""

    def __init__(self, n: int) -> None:
        self._count, self._sum, self._squares = np.zeros(n), np.zeros(n), np.zeros(n)

    def add(self, values: FloatArray, chosen: npt.NDArray[np.bool_]) -> None:
        self._count += chosen
        self._sum += values * chosen
        self._squares += values**2 * chosen

    def require(self, side: str, dynamics: Dynamics) -> None:
        """Raise a DataError unless every sample was counted."""
        if not self._count.all():
            missing = np.flatnonzero(self._count == 0)
            raise DataError(
                f"{len(missing)} of {dynamics.n} samples (for example {missing[0]}) were never {side} the subset that "
                f"one of the {dynamics.runs} runs of {dynamics.path} trained on; {MORE_RUNS}"
            )

    @property
    def mean(self) -> FloatArray:
        return self._sum / self._count

    def variance(self, soft: bool) -> FloatArray:
        """Of the mean."""
        m = self._count
        if not soft:
            share = (self._sum + 1) / (m + 2)
            return share * (1 - share) / m
        around = np.maximum(self._squares - self._sum**2 / m, 0) / np.maximum(m - 1, 1)
        return np.where(m > 1, around, 0.25) / m
