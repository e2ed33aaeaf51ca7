"""Gradient estimators against the exact gradient of an expected reward over all possible draws."""

import functools
import itertools
import math

import numpy as np
import pytest

from kdfast.errors import UsageError
from kdfast.pruning.if_beta.estimators import CommonNoise, Outcome, ScoreFunction
from kdfast.pruning.if_beta.policy import StratifiedSampler, average_ranks

VALUES = np.array([0.3, -1.0, 2.0, 0.1, 0.9, -0.4])
PHI = np.array([0.3, -0.2])


def reward_of(drawn):
    """Return a function of the set of samples that is not additive."""
    return float(VALUES[drawn].sum() + 0.5 * VALUES[drawn].prod())


def make_sampler(n=6, total=2):
    strata = np.zeros(n, np.int64)
    u = average_ranks(np.arange(n, dtype=float), strata)
    return StratifiedSampler.from_ranks(u, np.arange(n, dtype=np.int64), strata, total)


def expected_reward(sampler, phi):
    weights, total = np.exp(sampler.log_weights(*np.exp(phi))), 0.0
    for first, second in itertools.permutations(range(6), 2):
        p = weights[first] / weights.sum() * weights[second] / (weights.sum() - weights[first])
        total += p * reward_of(np.array([first, second]))
    return total


def exact_gradient(sampler, step=1e-5):
    shifts = step * np.eye(2)
    return np.array(
        [(expected_reward(sampler, PHI + s) - expected_reward(sampler, PHI - s)) / (2 * step) for s in shifts]
    )


def make_evaluate(sampler, seed, reward=reward_of):
    """Return the function from trials to outcomes that an estimator calls."""

    def evaluate(trials):
        outcomes = []
        for t in trials:
            drawn = sampler.draw(t.a, t.b, sampler.gumbel(seed, 0, t.draw))
            gradient = functools.partial(sampler.log_probability_gradient, drawn, t.a, t.b)
            outcomes.append(Outcome(reward(drawn), 0.5, gradient))
        return outcomes

    return evaluate


@pytest.mark.parametrize(
    "estimator", [CommonNoise(repeats=10, delta=0.2), ScoreFunction(draws=40, natural=False)], ids=["crn", "score"]
)
def test_estimators_match_the_exact_gradient(estimator):
    sampler = make_sampler()
    found = np.stack([estimator(PHI, make_evaluate(sampler, seed)).gradient for seed in range(100)])
    error = found.std(0, ddof=1) / len(found) ** 0.5
    assert (np.abs(found.mean(0) - exact_gradient(sampler)) < 4 * error + 2e-3).all()
    assert (error < 0.1).all()


def test_natural_gradient_is_the_inverse_fisher_matrix_times_the_gradient():
    sampler = make_sampler()
    plain = ScoreFunction(draws=2000, natural=False)(PHI, make_evaluate(sampler, 0)).gradient
    natural = ScoreFunction(draws=2000)(PHI, make_evaluate(sampler, 0)).gradient
    a, b = np.exp(PHI)
    scores = [sampler.log_probability_gradient(sampler.draw(a, b, sampler.gumbel(0, 0, k)), a, b) for k in range(2000)]
    fisher = np.cov(np.stack(scores).T)
    np.testing.assert_allclose(fisher @ natural, plain, rtol=0.15, atol=0.02)


def test_common_noise_has_lower_variance_than_the_score_function_at_equal_cost():
    sampler = make_sampler(500, 100)
    u = np.exp(sampler.log_ranks[:, 0])

    def reward(drawn):
        return -float(abs(u[drawn].mean() - 0.4))

    variance = [
        np.stack([estimator(PHI, make_evaluate(sampler, seed, reward)).gradient for seed in range(20)]).var(0).sum()
        for estimator in (CommonNoise(repeats=4, delta=0.2), ScoreFunction(draws=16, natural=False))
    ]
    assert 5 * variance[0] < variance[1]


def test_estimate_reports_means_and_trials():
    found = CommonNoise(repeats=3)(PHI, make_evaluate(make_sampler(), 0))
    assert found.trials == 12
    assert found.accuracy == 0.5
    assert math.isfinite(found.reward)


@pytest.mark.parametrize(
    "build", [lambda: CommonNoise(repeats=0), lambda: CommonNoise(delta=0), lambda: ScoreFunction(draws=3)]
)
def test_rejects_settings_that_give_no_estimate(build):
    with pytest.raises(UsageError):
        build()
