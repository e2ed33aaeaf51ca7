"""The outer loop: gradient ascent of the reward in phi = (ln a, ln b) with Adam, with a state that can be saved.

The logarithms keep both Beta parameters positive and make a step a relative change. `kdfast.pruning.if_beta.stages` has
the published outer loop, with the same state and methods.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import numpy as np

from kdfast.errors import DivergedError, UsageError
from kdfast.pruning.if_beta.estimators import Estimate, Estimator, EvaluateAt
from kdfast.pruning.if_beta.policy import MAX_PARAMETER, MIN_PARAMETER
from kdfast.pruning.rules.base import FloatArray

_BETA1, _BETA2, _EPSILON = 0.9, 0.99, 1e-12
_PATIENCE = 5


@dataclass
class SearchState:
    """Progress of a search. The fields are plain numbers and the keys of the checkpoint, so JSON stores them exactly.

    Attributes:
        phi: The two numbers that the search moves: (ln a, ln b), or (mu, ln tau).
        step: Number of completed steps.
        first: Adam's running mean of the gradient.
        second: Adam's running mean of the squared gradient.
        quiet: Number of consecutive short steps.
        path: (a, b) before each step, then the current (a, b).
        rewards: Mean reward over the trials of each step.
        accuracies: Mean held-out accuracy of the proxies of each step.
        trials: Number of proxies trained.
        seconds: Time spent.
    """

    phi: list[float]
    step: int = 0
    first: list[float] = field(default_factory=lambda: [0.0, 0.0])
    second: list[float] = field(default_factory=lambda: [0.0, 0.0])
    quiet: int = 0
    path: list[list[float]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    trials: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def check(self, found: Estimate) -> None:
        """Raise unless the reward and the gradient of the current step are finite.

        Raises:
            DivergedError: One is not.
        """
        if not (np.isfinite(found.gradient).all() and math.isfinite(found.reward)):
            a, b = self.path[-1]
            raise DivergedError(
                f"step {self.step} at a = {a:.3g}, b = {b:.3g}: the reward {found.reward} or its gradient "
                f"{found.gradient.tolist()} is not finite: lower the proxies' learning rate or correct the reward"
            )

    def adam_step(self, gradient: FloatArray, rate: float, count: int) -> FloatArray:
        """Update Adam's running means and return the step, float64 (n,).

        All entries share one scale: in a valley, Adam's scale per axis would amplify the noise of the flat axis.

        Args:
            gradient: float64 (n,), n = 1 or 2; it belongs to the last n numbers of `phi`.
            rate: Step size.
            count: Number of this step of Adam, from 1.
        """
        size = len(gradient)
        first = _BETA1 * np.array(self.first[-size:]) + (1 - _BETA1) * gradient
        second = _BETA2 * np.array(self.second[-size:]) + (1 - _BETA2) * gradient**2
        scale = math.sqrt(second.mean() / (1 - _BETA2**count)) + _EPSILON
        self.first[-size:], self.second[-size:] = first.tolist(), second.tolist()
        step: FloatArray = rate * first / (1 - _BETA1**count) / scale
        return step

    def complete_step(self, phi: list[float], policy: list[float], found: Estimate) -> None:
        """Move on to `phi`, which stands for the (a, b) `policy`, after a step with the outcome `found`."""
        self.step += 1
        self.phi = phi
        self.path.append(policy)
        self.rewards.append(found.reward)
        self.accuracies.append(found.accuracy)
        self.trials += found.trials


@dataclass(frozen=True)
class Schedule:
    """Settings of the search; part of its identity on disk.

    Attributes:
        steps: Maximum number of steps.
        lr: Initial step size of Adam in phi; it decays to zero along a cosine.
        tolerance: The search ends after five consecutive steps shorter than this.
        average: Share of the steps, counted from the end, over which phi is averaged for the result: near an optimum
            the gradient is mostly noise, and so is the last iterate.
        start: Initial (a, b).
        keeps_uniform: Whether the uniform policy is used where the learned one is not better on fresh draws.
    """

    steps: int = 50
    lr: float = 0.1
    tolerance: float = 0.01
    average: float = 0.2
    start: tuple[float, float] = (1.0, 1.0)

    keeps_uniform: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < math.inf or not 0 < self.average <= 1:
            raise UsageError(
                f"Schedule has steps {self.steps}, lr {self.lr} and average {self.average}: pass at least one step, a "
                "positive finite lr and an average in (0, 1]"
            )
        if not all(MIN_PARAMETER <= value <= MAX_PARAMETER for value in self.start):
            raise UsageError(f"Schedule has start {self.start}: pass a and b in [{MIN_PARAMETER:g}, {MAX_PARAMETER:g}]")

    @property
    def total(self) -> int:
        """Maximum number of steps."""
        return self.steps

    def initial(self) -> SearchState:
        """Return the state at `start`."""
        return SearchState(phi=[math.log(value) for value in self.start], path=[list(self.start)])

    def policy(self, phi: list[float]) -> list[float]:
        """Return the (a, b) that phi stands for."""
        a, b = np.exp(phi).tolist()
        return [a, b]

    def is_finished(self, state: SearchState) -> bool:
        """Return whether all steps are done or the search has converged."""
        return state.step >= self.steps or state.quiet >= _PATIENCE

    def take_step(self, state: SearchState, estimator: Estimator, evaluate: EvaluateAt) -> None:
        """Update the state by one step of Adam, in place.

        Args:
            state: The search.
            estimator: Estimator of the gradient of the reward.
            evaluate: Trains proxies on the draws of trials.

        Raises:
            DivergedError: A reward or the gradient is not finite. The state is unchanged.
        """
        phi = np.array(state.phi)
        found = estimator(phi, lambda trials: evaluate(trials, state.step))
        state.check(found)
        rate = self.lr * (1 + math.cos(math.pi * state.step / self.steps)) / 2
        moved = np.clip(
            phi + state.adam_step(found.gradient, rate, state.step + 1),
            math.log(MIN_PARAMETER),
            math.log(MAX_PARAMETER),
        )
        state.quiet = state.quiet + 1 if float(np.linalg.norm(moved - phi)) < self.tolerance else 0
        state.complete_step(moved.tolist(), self.policy(moved.tolist()), found)

    def learned(self, state: SearchState) -> tuple[float, float]:
        """Return the geometric mean of (a, b) over the last part of the path."""
        count = max(1, math.ceil(self.average * state.step))
        a, b = np.exp(np.log(np.array(state.path[-count:])).mean(0))
        return float(a), float(b)
