"""Estimators of the gradient of the expected reward in phi = (ln a, ln b).

`crn`: central differences under common random numbers. The evaluations at phi + delta and phi - delta share the Gumbel
noise, initial parameters and batch order, so most of the noise of their rewards cancels. The estimate is that of a
slightly smoothed objective (error of order delta^2).

`score`: the score-function estimator (REINFORCE), reward times the gradient of the log-probability of the draw. It is
unbiased for any reward, but much noisier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from kdfast.errors import UsageError
from kdfast.pruning.rules.base import FloatArray


class Trial(NamedTuple):
    """One draw to evaluate: the parameters of the policy and the number of the draw, which selects its noise."""

    a: float
    b: float
    draw: int


class Outcome(NamedTuple):
    """Result of a trial: reward, held-out accuracy, and a function returning the gradient of ln p(draw) in phi."""

    reward: float
    accuracy: float
    log_probability_gradient: Callable[[], FloatArray]


Evaluate = Callable[[Sequence[Trial]], list[Outcome]]
# Maps trials and the number of a step, which selects the noise that they share, to their outcomes.
EvaluateAt = Callable[[Sequence[Trial], int], list[Outcome]]


class Estimate(NamedTuple):
    """A gradient in phi and the means over the trials behind it.

    Attributes:
        gradient: float64 (2,).
        reward: Mean reward.
        accuracy: Mean held-out accuracy.
        trials: Number of proxies trained.
    """

    gradient: FloatArray
    reward: float
    accuracy: float
    trials: int


class Estimator(Protocol):
    """A gradient estimator of the expected reward."""

    def __call__(self, phi: FloatArray, evaluate: Evaluate) -> Estimate:
        """Estimate the gradient at phi = (ln a, ln b), float64 (2,)."""


# The repr of an estimator is part of a search's identity: renaming a class or field orphans checkpoints on disk.
@dataclass(frozen=True)
class CommonNoise:
    """Central differences under common random numbers.

    Attributes:
        repeats: Number of noise samples to average over; each costs four proxies.
        delta: Half the distance between the two points, in phi.
    """

    repeats: int = 2
    delta: float = 0.2

    def __post_init__(self) -> None:
        if self.repeats < 1 or self.delta <= 0:
            raise UsageError(f"CommonNoise has repeats {self.repeats} and delta {self.delta}: pass positive values")

    def __call__(self, phi: FloatArray, evaluate: Evaluate) -> Estimate:
        """Average (R(phi + delta e) - R(phi - delta e)) / (2 delta) over the noise samples, for each axis e."""
        shifts = self.delta * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        points = np.exp(phi + shifts).tolist()
        outcomes = evaluate([Trial(a, b, draw) for draw in range(self.repeats) for a, b in points])
        rewards = np.array([o.reward for o in outcomes])
        up, down = rewards.reshape(self.repeats, 2, 2).mean(0).T
        return Estimate((up - down) / (2 * self.delta), *mean_outcomes(outcomes))


@dataclass(frozen=True)
class ScoreFunction:
    """The score-function estimator with a leave-one-out baseline.

    Attributes:
        draws: Number of draws to average over, at least 2.
        natural: Whether to multiply by the inverse covariance of the scores (the natural gradient), which normalizes
            the unequal scales of the two axes; requires at least 4 draws.
    """

    draws: int = 32
    natural: bool = True

    def __post_init__(self) -> None:
        least = 4 if self.natural else 2
        if self.draws < least:
            raise UsageError(f"ScoreFunction has draws {self.draws} and natural {self.natural}: pass at least {least}")

    def __call__(self, phi: FloatArray, evaluate: Evaluate) -> Estimate:
        """Average (R_k - mean of the other rewards) * grad ln p_k."""
        a, b = np.exp(phi).tolist()
        outcomes = evaluate([Trial(a, b, draw) for draw in range(self.draws)])
        rewards = np.array([o.reward for o in outcomes])
        scores = np.stack([o.log_probability_gradient() for o in outcomes])
        baseline = (rewards.sum() - rewards) / (self.draws - 1)
        gradient = (rewards - baseline) @ scores / self.draws
        if self.natural:
            covariance = scores.T @ scores / self.draws
            gradient = np.linalg.solve(covariance + 1e-3 * np.trace(covariance) * np.eye(2), gradient)
        return Estimate(gradient, *mean_outcomes(outcomes))


ESTIMATORS: dict[str, Callable[[], Estimator]] = {"crn": CommonNoise, "score": ScoreFunction}


def mean_outcomes(outcomes: list[Outcome]) -> tuple[float, float, int]:
    """Return the mean reward, the mean accuracy and the number of the outcomes: the last fields of an `Estimate`."""
    rewards, accuracies = np.array([(o.reward, o.accuracy) for o in outcomes]).T
    return float(rewards.mean()), float(accuracies.mean()), len(outcomes)
