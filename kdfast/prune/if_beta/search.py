"""The outer loop: ascent of the reward in phi = (ln a, ln b) by Adam, with a state that can be saved."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from kdfast.errors import DivergedError, UsageError
from kdfast.prune.if_beta.gradient import Estimate
from kdfast.prune.if_beta.policy import HIGHEST, LOWEST, FloatArray

_FIRST, _SECOND, _EPSILON = 0.9, 0.99, 1e-12
_QUIET_STEPS = 5


@dataclass(frozen=True)
class Schedule:
    """How the policy's parameters move.

    Attributes:
        steps: At most so many steps.
        lr: Adam's step size in phi at the start; it falls to zero along a cosine.
        tolerance: The search ends after five steps in a row that are shorter than this.
        average: Share of the steps, counted from the last, whose parameters are averaged (in phi) for the result: near
            an optimum the gradient is noise, and so is where the last step ends.
        start: (a, b) at the start.
    """

    steps: int = 50
    lr: float = 0.1
    tolerance: float = 0.01
    average: float = 0.2
    start: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < math.inf or not 0 < self.average <= 1:
            raise UsageError(
                f"a search of {self.steps} steps with lr {self.lr}, averaged over {self.average} of them: needs a "
                "positive number of steps, a positive lr and a share in (0, 1]"
            )
        if not all(LOWEST <= value <= HIGHEST for value in self.start):
            raise UsageError(f"a search that starts at {self.start}: a and b must lie in [{LOWEST}, {HIGHEST}]")


@dataclass
class SearchState:
    """Where a search stands; plain numbers, so JSON holds it without loss.

    Attributes:
        step: Steps done.
        phi: (ln a, ln b).
        first: Adam's running mean of the gradient.
        second: Adam's running mean of its square.
        quiet: Short steps in a row.
        path: (a, b) before each step, and at last where it stands.
        rewards: Mean reward of each step's trials.
        accuracies: Mean accuracy of the proxies on the held-out part, each step.
        trials: Proxies trained so far.
        seconds: Time spent so far.
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
    def begin(cls, schedule: Schedule) -> SearchState:
        """The state before the first step."""
        return cls(phi=[math.log(value) for value in schedule.start], path=[list(schedule.start)])

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def ended(state: SearchState, schedule: Schedule) -> bool:
    """Whether the search has done its steps or come to rest."""
    return state.step >= schedule.steps or state.quiet >= _QUIET_STEPS


def ascend(state: SearchState, schedule: Schedule, estimate: Callable[[FloatArray, int], Estimate]) -> Estimate:
    """Do one step, in place.

    Args:
        state: Where the search stands.
        schedule: How it moves.
        estimate: From (phi, step) to the gradient there.

    Returns:
        The estimate that the step was made from.

    Raises:
        DivergedError: A reward or the gradient is not finite. The state is as before the step.
    """
    phi = np.array(state.phi)
    found = estimate(phi, state.step)
    if not (np.isfinite(found.gradient).all() and math.isfinite(found.reward)):
        a, b = np.exp(phi)
        raise DivergedError(
            f"step {state.step} at a = {a:.3g}, b = {b:.3g}: the reward is {found.reward}, its gradient "
            f"{found.gradient.tolist()}; the reward or the proxy gives numbers that are not finite: lower the proxy's "
            "learning rate or mend the reward"
        )
    count = state.step + 1
    first = _FIRST * np.array(state.first) + (1 - _FIRST) * found.gradient
    second = _SECOND * np.array(state.second) + (1 - _SECOND) * found.gradient**2
    # One scale for both axes: a policy in a valley must not be pushed along it by the noise of the flat axis.
    scale = math.sqrt(second.mean() / (1 - _SECOND**count)) + _EPSILON
    rate = schedule.lr * (1 + math.cos(math.pi * state.step / schedule.steps)) / 2
    moved = np.clip(phi + rate * first / (1 - _FIRST**count) / scale, math.log(LOWEST), math.log(HIGHEST))
    state.quiet = state.quiet + 1 if float(np.linalg.norm(moved - phi)) < schedule.tolerance else 0
    state.step, state.phi = count, moved.tolist()
    state.first, state.second = first.tolist(), second.tolist()
    state.path.append(np.exp(moved).tolist())
    state.rewards.append(found.reward)
    state.accuracies.append(found.accuracy)
    state.trials += found.trials
    return found


def result_of(state: SearchState, schedule: Schedule) -> tuple[float, float]:
    """(a, b): the geometric mean over the last part of the path."""
    count = max(1, math.ceil(schedule.average * state.step))
    a, b = np.exp(np.log(np.array(state.path[-count:])).mean(0))
    return float(a), float(b)
