"""Where policies are tried: draws become trained proxies, and proxies become rewards on the held-out part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DivergedError
from kdfast.prune.if_beta.gradient import Evaluate, Outcome, Trial
from kdfast.prune.if_beta.inner import Budget, Lesson, train
from kdfast.prune.if_beta.plackett import log_probability_gradient
from kdfast.prune.if_beta.policy import Design, FloatArray
from kdfast.prune.if_beta.proxy import Proxy
from kdfast.prune.if_beta.reward import Reward, accuracy_reward, judge

_COMPARED = 16


@dataclass(frozen=True)
class Gain:
    """A policy against another on the same noises.

    Attributes:
        reward: Mean reward of the one.
        baseline: Mean reward of the other.
        difference: Mean of the differences.
        half_width: Of the 95% interval of that mean.
        accuracy: Mean accuracy on the held-out part of the one.
        baseline_accuracy: And of the other.
    """

    reward: float
    baseline: float
    difference: float
    half_width: float
    accuracy: float
    baseline_accuracy: float


class Arena:
    """Trains proxies on draws and judges them.

    Args:
        proxy: The family of networks.
        reward: What is to be large.
        budget: How they are trained.
        lesson: All training samples, on the device where proxies are trained.
        held: int64 (n,), the samples that judge.
        seed: Seed of all noise.
    """

    def __init__(self, proxy: Proxy, reward: Reward, budget: Budget, lesson: Lesson, held: IntArray, seed: int) -> None:
        self._proxy, self._budget, self._seed = proxy, budget, seed
        self._rewards = [reward, accuracy_reward]
        self._lesson, self._held = lesson, held
        self._judges = lesson.take(torch.from_numpy(held).to(lesson.x.device))

    def rewards(self, draws: IntArray, step: int) -> FloatArray:
        """Train one proxy on each draw and judge it.

        Args:
            draws: int64 (K, m), samples.
            step: Which initial parameters and batch order; shared by the K.

        Returns:
            float64 (2, K): rewards and accuracies.
        """
        parameters = train(self._proxy, self._lesson, draws, self._budget, self._seed, step)
        return judge(self._proxy, parameters, self._judges, self._budget.temperature, self._rewards)

    def evaluator(self, design: Design, step: int) -> Evaluate:
        """The function from trials to outcomes at one step of a search."""

        def evaluate(trials: Sequence[Trial]) -> list[Outcome]:
            noises = {t.draw: design.gumbel(self._seed, step, t.draw) for t in trials}
            drawn = [design.draw(t.a, t.b, noises[t.draw]) for t in trials]
            rewards, accuracies = self.rewards(design.ids[np.stack(drawn)], step)
            return [
                Outcome(float(r), float(accuracy), _Score(design, d, t))
                for r, accuracy, d, t in zip(rewards, accuracies, drawn, trials, strict=True)
            ]

        return evaluate

    def compare(self, design: Design, one: tuple[float, float], other: tuple[float, float], step: int) -> Gain:
        """One policy against another, with 16 noises that both share.

        Raises:
            DivergedError: A reward is not finite.
        """
        trials = [Trial(*parameters, draw) for parameters in (one, other) for draw in range(_COMPARED)]
        found = np.array([(o.reward, o.accuracy) for o in self.evaluator(design, step)(trials)])
        _check_finite(found)
        (reward, accuracy), (baseline, baseline_accuracy) = found.reshape(2, _COMPARED, 2).mean(1)
        differences = found[:_COMPARED, 0] - found[_COMPARED:, 0]
        # 2.131: the 97.5% quantile of Student's t with 15 degrees of freedom.
        half_width = 2.131 * differences.std(ddof=1) / _COMPARED**0.5
        numbers = (reward, baseline, differences.mean(), half_width, accuracy, baseline_accuracy)
        return Gain(*(float(number) for number in numbers))

    def best(self, draws: list[IntArray], step: int) -> int:
        """Which draw has the highest reward; held-out samples in it are left out, and all are cut to one length.

        Raises:
            DivergedError: A reward is not finite.
        """
        rows = [draw[~np.isin(draw, self._held)] for draw in draws]
        shortest = min(len(row) for row in rows)
        found = self.rewards(np.stack([row[:shortest] for row in rows]), step)
        _check_finite(found)
        return int(found[0].argmax())


def _check_finite(rewards: FloatArray) -> None:
    if not np.isfinite(rewards).all():
        raise DivergedError(
            "a reward of the final draws is not finite; the search itself is kept. Lower the proxy's learning rate or "
            "mend the reward"
        )


@dataclass(frozen=True)
class _Score:
    """The gradient of a trial's log-probability, computed when it is asked for."""

    design: Design
    drawn: IntArray
    trial: Trial

    def __call__(self) -> FloatArray:
        return log_probability_gradient(self.design, self.drawn, self.trial.a, self.trial.b)
