"""Evaluation of policies: train proxies on drawn subsets and compute their rewards on the held-out set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DivergedError
from kdfast.pruning.if_beta.estimators import Outcome, Trial
from kdfast.pruning.if_beta.policy import StratifiedSampler
from kdfast.pruning.if_beta.proxy import Proxy, ProxyData, ProxyTrainingConfig, train_proxies
from kdfast.pruning.if_beta.reward import Reward, accuracy_reward, mean_rewards
from kdfast.pruning.rules.base import FloatArray

_PAIRS = 16
# 97.5% quantile of Student's t with _PAIRS - 1 = 15 degrees of freedom.
_T_QUANTILE = 2.131


@dataclass(frozen=True)
class PairedComparison:
    """A policy compared with a baseline policy under the same noise.

    Attributes:
        reward: Mean reward of the policy.
        baseline: Mean reward of the baseline.
        difference: Mean paired difference of the rewards.
        half_width: Half width of the 95% interval of `difference`.
        accuracy: Mean held-out accuracy of the policy.
        baseline_accuracy: Mean held-out accuracy of the baseline.
    """

    reward: float
    baseline: float
    difference: float
    half_width: float
    accuracy: float
    baseline_accuracy: float


class PolicyEvaluator:
    """Trains proxies on drawn subsets and rewards them by their outputs on the held-out set.

    Args:
        proxy: The proxies' architecture.
        reward: The reward to maximize.
        budget: The proxies' training settings.
        data: All training samples, on the device to train on.
        held_out: int64 (n,), indices of the held-out set.
        seed: Seed of all noise.
    """

    def __init__(
        self, proxy: Proxy, reward: Reward, budget: ProxyTrainingConfig, data: ProxyData, held_out: IntArray, seed: int
    ) -> None:
        self._proxy, self._budget, self._seed = proxy, budget, seed
        self._rewards = [reward, accuracy_reward]
        self._data, self._held_out = data, held_out
        self._held_out_data = data.select(torch.from_numpy(held_out).to(data.x.device))

    def evaluate_draws(self, draws: IntArray, step: int) -> FloatArray:
        """Train one proxy on each draw and compute its reward.

        Args:
            draws: int64 (K, m), indices of samples.
            step: Step of the search; it selects the initial parameters and the batch order, shared by the K proxies.

        Returns:
            float64 (2, K): rewards and accuracies.
        """
        parameters = train_proxies(self._proxy, self._data, draws, self._budget, self._seed, step)
        return mean_rewards(self._proxy, parameters, self._held_out_data, self._budget.temperature, self._rewards)

    def evaluate(self, trials: Sequence[Trial], *, sampler: StratifiedSampler, step: int) -> list[Outcome]:
        """Draw a subset for each trial and evaluate it.

        Args:
            trials: Policies and the numbers of their draws.
            sampler: The samples to draw from.
            step: Step of the search.
        """
        noises = {t.draw: sampler.gumbel(self._seed, step, t.draw) for t in trials}
        drawn = [sampler.draw(t.a, t.b, noises[t.draw]) for t in trials]
        rewards, accuracies = self.evaluate_draws(sampler.ids[np.stack(drawn)], step)
        return [
            Outcome(float(r), float(accuracy), partial(sampler.log_probability_gradient, d, t.a, t.b))
            for r, accuracy, d, t in zip(rewards, accuracies, drawn, trials, strict=True)
        ]

    def compare(
        self, sampler: StratifiedSampler, policy: tuple[float, float], baseline: tuple[float, float], step: int
    ) -> PairedComparison:
        """Compare two policies (a, b) on 16 draws with shared noise.

        Raises:
            DivergedError: A reward is not finite.
        """
        trials = [Trial(*parameters, draw) for parameters in (policy, baseline) for draw in range(_PAIRS)]
        outcomes = self.evaluate(trials, sampler=sampler, step=step)
        values = np.array([(o.reward, o.accuracy) for o in outcomes])
        _check_finite(values)
        (reward, accuracy), (other, other_accuracy) = values.reshape(2, _PAIRS, 2).mean(1)
        differences = values[:_PAIRS, 0] - values[_PAIRS:, 0]
        half_width = _T_QUANTILE * differences.std(ddof=1) / _PAIRS**0.5
        numbers = (reward, other, differences.mean(), half_width, accuracy, other_accuracy)
        return PairedComparison(*(float(number) for number in numbers))

    def select_best(self, draws: list[IntArray], step: int) -> int:
        """Return the position of the draw of highest reward.

        Held-out samples are left out of the draws, and all draws are truncated to the same length.

        Raises:
            DivergedError: A reward is not finite.
        """
        rows = [draw[~np.isin(draw, self._held_out)] for draw in draws]
        shortest = min(len(row) for row in rows)
        values = self.evaluate_draws(np.stack([row[:shortest] for row in rows]), step)
        _check_finite(values)
        return int(values[0].argmax())


def _check_finite(rewards: FloatArray) -> None:
    if not np.isfinite(rewards).all():
        raise DivergedError(
            "a reward of the final draws is not finite; the completed search is saved: lower the proxies' learning "
            "rate or correct the reward, then run again"
        )
