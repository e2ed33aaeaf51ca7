"""The outer loop: gradient ascent of the reward in phi = (ln a, ln b) with Adam, with a state that can be saved.

The logarithms keep both Beta parameters positive and make a step a relative change.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kdfast.errors import DivergedError, UsageError
from kdfast.prune.if_beta.estimators import Estimate
from kdfast.prune.if_beta.policy import MAX_PARAMETER, MIN_PARAMETER
from kdfast.prune.rules.base import FloatArray

_BETA1, _BETA2, _EPSILON = 0.9, 0.99, 1e-12
_PATIENCE = 5


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
    """

    steps: int = 50
    lr: float = 0.1
    tolerance: float = 0.01
    average: float = 0.2
    start: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < math.inf or not 0 < self.average <= 1:
            raise UsageError(
                f"Schedule has steps {self.steps}, lr {self.lr} and average {self.average}: pass at least one step, a "
                "positive finite lr and an average in (0, 1]"
            )
        if not all(MIN_PARAMETER <= value <= MAX_PARAMETER for value in self.start):
            raise UsageError(f"Schedule has start {self.start}: pass a and b in [{MIN_PARAMETER:g}, {MAX_PARAMETER:g}]")


@dataclass
class SearchState:
    """Progress of a search. The fields are plain numbers and the keys of the checkpoint, so JSON stores them exactly.

    Attributes:
        phi: (ln a, ln b).
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

    @classmethod
    def initial(cls, schedule: Schedule) -> SearchState:
        """Return the state before the first step."""
        return cls(phi=[math.log(value) for value in schedule.start], path=[list(schedule.start)])

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


def is_finished(state: SearchState, schedule: Schedule) -> bool:
    """Return whether all steps are done or the search has converged."""
    return state.step >= schedule.steps or state.quiet >= _PATIENCE


def take_step(state: SearchState, schedule: Schedule, estimate: Callable[[FloatArray, int], Estimate]) -> Estimate:
    """Update the state by one step of Adam, in place.

    Args:
        state: The search.
        schedule: Its settings.
        estimate: Maps (phi, step) to a gradient estimate.

    Returns:
        The estimate behind the step.

    Raises:
        DivergedError: A reward or the gradient is not finite. The state is unchanged.
    """
    phi = np.array(state.phi)
    found = estimate(phi, state.step)
    if not (np.isfinite(found.gradient).all() and math.isfinite(found.reward)):
        a, b = np.exp(phi)
        raise DivergedError(
            f"step {state.step} at a = {a:.3g}, b = {b:.3g}: the reward {found.reward} or its gradient "
            f"{found.gradient.tolist()} is not finite: lower the proxies' learning rate or correct the reward"
        )
    count = state.step + 1
    first = _BETA1 * np.array(state.first) + (1 - _BETA1) * found.gradient
    second = _BETA2 * np.array(state.second) + (1 - _BETA2) * found.gradient**2
    # Both axes share one scale: in a valley, Adam's scale per axis would amplify the noise of the flat axis.
    scale = math.sqrt(second.mean() / (1 - _BETA2**count)) + _EPSILON
    rate = schedule.lr * (1 + math.cos(math.pi * state.step / schedule.steps)) / 2
    moved = np.clip(phi + rate * first / (1 - _BETA1**count) / scale, math.log(MIN_PARAMETER), math.log(MAX_PARAMETER))
    state.quiet = state.quiet + 1 if float(np.linalg.norm(moved - phi)) < schedule.tolerance else 0
    state.step, state.phi = count, moved.tolist()
    state.first, state.second = first.tolist(), second.tolist()
    state.path.append(np.exp(moved).tolist())
    state.rewards.append(found.reward)
    state.accuracies.append(found.accuracy)
    state.trials += found.trials
    return found


def averaged_parameters(state: SearchState, schedule: Schedule) -> tuple[float, float]:
    """Return the geometric mean of (a, b) over the last part of the path."""
    count = max(1, math.ceil(schedule.average * state.step))
    a, b = np.exp(np.log(np.array(state.path[-count:])).mean(0))
    return float(a), float(b)
