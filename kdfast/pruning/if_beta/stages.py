"""The published outer loop: every mode mu of a grid at one sharpness tau, then tau by REINFORCE at the best mode.

The policy weights a sample by Beta(tau mu + 1, tau (1 - mu) + 1) at its percentile s, where a small s is hard. Its mode
is mu, and it becomes uniform as tau goes to 0; both parameters are at least 1, so it is never U-shaped.

Source: Wu et al., "Distill on a Diet: Efficient Knowledge Distillation via Learnable Data Pruning", ECCV 2026, arXiv
2606.25488. Kept: the policy, the grid, one gradient of `-L grad ln p` per step, 20 steps, and step sizes from 0.1 to
0.01 along a cosine. Chosen here, where the paper leaves it open: Adam on ln tau, so that a step is a relative change
whatever the size of the subset; a baseline and noise that the draws share, which only lower the variance.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kdfast.errors import UsageError
from kdfast.pruning.if_beta.estimators import Estimate, Estimator, EvaluateAt, Trial, mean_outcomes
from kdfast.pruning.if_beta.policy import MAX_PARAMETER
from kdfast.pruning.if_beta.search import SearchState
from kdfast.pruning.rules.base import FloatArray

MIN_TAU, MAX_TAU = 0.01, MAX_PARAMETER - 1


def beta_parameters(mu: float, tau: float) -> tuple[float, float]:
    """Return (a, b) of the density over kdfast's ranks u, where a large u is hard.

    The paper's s is 1 - u: this exchange of a and b is the only place where the two directions meet.

    Args:
        mu: Mode of the density over s, in [0, 1]; 0: the hardest samples.
        tau: Sharpness, > 0.
    """
    return tau * (1 - mu) + 1, tau * mu + 1


def mode_and_sharpness(a: float, b: float) -> tuple[float, float]:
    """Return (mu, tau) of (a, b) with a + b > 2: the inverse of `beta_parameters`."""
    tau = a + b - 2
    return (b - 1) / tau, tau


@dataclass(frozen=True)
class TwoStages:
    """Settings of the published search; part of its identity on disk.

    Attributes:
        mu_step: Distance of the grid's modes, rounded so that it divides 1.
        tau: Sharpness of the first stage, and where the second starts.
        repeats: Number of draws of each mode, the same noise for all of them.
        steps: Number of steps of the second stage.
        lr: Initial step size of Adam in ln tau.
        final_lr: Last step size.
        keeps_uniform: Whether the uniform policy is used where the learned one is not better on fresh draws.
    """

    mu_step: float = 0.1
    tau: float = 6.0
    repeats: int = 8
    steps: int = 20
    lr: float = 0.1
    final_lr: float = 0.01

    keeps_uniform: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not (0 < self.mu_step <= 1 and MIN_TAU <= self.tau <= MAX_TAU and 0 < self.final_lr <= self.lr < math.inf):
            raise UsageError(
                f"TwoStages has mu_step {self.mu_step}, tau {self.tau}, lr {self.lr} and final_lr {self.final_lr}: "
                f"pass a mu_step above 0 and at most 1, a tau in [{MIN_TAU:g}, {MAX_TAU:g}], and step sizes that fall"
            )
        if self.repeats < 1 or self.steps < 1:
            raise UsageError(f"TwoStages has repeats {self.repeats} and steps {self.steps}: pass at least one of each")

    @property
    def grid(self) -> FloatArray:
        """The modes of the first stage, from 0 to 1."""
        return np.linspace(0, 1, round(1 / self.mu_step) + 1)

    @property
    def total(self) -> int:
        """Number of steps of both stages."""
        return len(self.grid) + self.steps

    def initial(self) -> SearchState:
        """Return the state at the first mode of the grid."""
        phi = [float(self.grid[0]), math.log(self.tau)]
        return SearchState(phi, path=[self.policy(phi)])

    def policy(self, phi: list[float]) -> list[float]:
        """Return the (a, b) that phi = (mu, ln tau) stands for."""
        mu, log_tau = phi
        return list(beta_parameters(mu, math.exp(log_tau)))

    def is_finished(self, state: SearchState) -> bool:
        """Return whether both stages are done."""
        return state.step >= self.total

    def take_step(self, state: SearchState, estimator: Estimator, evaluate: EvaluateAt) -> None:
        """Evaluate one mode, or move tau by one step; arguments and errors as for `Schedule.take_step`."""
        if state.step < len(self.grid):
            self._evaluate_mode(state, evaluate)
        else:
            self._move_sharpness(state, estimator, evaluate)

    def learned(self, state: SearchState) -> tuple[float, float]:
        """Return the last (a, b)."""
        a, b = state.path[-1]
        return a, b

    def _evaluate_mode(self, state: SearchState, evaluate: EvaluateAt) -> None:
        a, b = state.path[-1]
        # Step 0 for every mode: all of them share the noise of their draws, the batches and the initial parameters.
        outcomes = evaluate([Trial(a, b, draw) for draw in range(self.repeats)], 0)
        found = Estimate(np.zeros(1), *mean_outcomes(outcomes))
        state.check(found)
        rewards = [*state.rewards, found.reward]
        following = len(rewards) if len(rewards) < len(self.grid) else int(np.argmax(rewards))
        phi = [float(self.grid[following]), math.log(self.tau)]
        state.complete_step(phi, self.policy(phi), found)

    def _move_sharpness(self, state: SearchState, estimator: Estimator, evaluate: EvaluateAt) -> None:
        mu, log_tau = state.phi
        a, b = state.path[-1]
        found = estimator(np.log([a, b]), lambda trials: evaluate(trials, state.step))
        # From the gradient in (ln a, ln b), by the chain rule.
        slopes = math.exp(log_tau) * np.array([(1 - mu) / a, mu / b])
        found = found._replace(gradient=np.array([found.gradient @ slopes]))
        state.check(found)
        done = state.step - len(self.grid)
        share = done / max(1, self.steps - 1)
        rate = self.final_lr + (self.lr - self.final_lr) * (1 + math.cos(math.pi * share)) / 2
        moved = log_tau + float(state.adam_step(found.gradient, rate, done + 1)[0])
        moved = min(max(moved, math.log(MIN_TAU)), math.log(MAX_TAU))
        state.complete_step([mu, moved], self.policy([mu, moved]), found)
