"""Ranks, weights, noise, draws, the log-probability of a draw, and the held-out set."""

import itertools
import math

import numpy as np
import pytest
from scipy.stats import chisquare, rankdata

from kdfast.errors import SubsetError
from kdfast.pruning.if_beta.policy import StratifiedSampler, average_ranks


def make_sampler(n=5, total=2, strata=None):
    strata = np.zeros(n, np.int64) if strata is None else np.array(strata)
    u = average_ranks(np.arange(n, dtype=float), strata)
    return StratifiedSampler.from_ranks(u, np.arange(n, dtype=np.int64), strata, total)


def probability(log_weights, sequence):
    """Return the Plackett-Luce probability, term by term."""
    left, p = dict(enumerate(np.exp(log_weights))), 1.0
    for j in sequence:
        p *= left[j] / sum(left.values())
        del left[j]
    return p


def test_ranks_of_ties_are_averaged_within_each_stratum():
    values = np.array([3.0, 1.0, 3.0, 5.0, 2.0, 2.0, 2.0])
    strata = np.array([0, 0, 0, 0, 1, 1, 1])
    u = average_ranks(values, strata)
    np.testing.assert_allclose(u[:4], (rankdata(values[:4]) - 0.5) / 4)
    np.testing.assert_allclose(u[4:], 0.5)


def test_ranks_are_independent_of_sample_order():
    rng = np.random.default_rng(0)
    values, strata, order = rng.integers(0, 20, 200).astype(float), rng.integers(0, 3, 200), rng.permutation(200)
    np.testing.assert_array_equal(average_ranks(values, strata)[order], average_ranks(values[order], strata[order]))


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (3.0, 0.7), (0.3, 4.0)])
def test_draws_are_plackett_luce(a, b):
    sampler, repeats = make_sampler(), 20_000
    sequences = list(itertools.permutations(range(5), 2))
    found = dict.fromkeys(sequences, 0)
    for k in range(repeats):
        found[tuple(sampler.draw(a, b, sampler.gumbel(7, 0, k)).tolist())] += 1
    expected = np.array([probability(sampler.log_weights(a, b), s) for s in sequences])
    assert math.isclose(expected.sum(), 1)
    assert chisquare(list(found.values()), repeats * expected).pvalue > 1e-3


def test_draws_have_the_count_of_every_stratum():
    strata = [0] * 60 + [1] * 30 + [2] * 10
    sampler = make_sampler(100, 20, strata)
    drawn = sampler.draw(2.0, 0.5, sampler.gumbel(0, 3, 1))
    assert np.bincount(np.array(strata)[drawn]).tolist() == [12, 6, 2]
    assert len(set(drawn.tolist())) == 20


def test_equal_counts():
    strata = np.array([0] * 60 + [1] * 30)
    sampler = StratifiedSampler.from_ranks(np.full(90, 0.5), np.arange(90), strata, 20, "equal")
    assert sampler.counts.tolist() == [10, 10]


def test_noise_is_standard_gumbel_and_a_function_of_the_sample():
    sampler = make_sampler(50_000, 10)
    noise = sampler.gumbel(1, 2, 3)
    assert noise.mean() == pytest.approx(0.5772, abs=0.03)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.05)
    part = StratifiedSampler(sampler.ids[100:200], sampler.strata[100:200], sampler.log_ranks[100:200], np.array([10]))
    np.testing.assert_array_equal(part.gumbel(1, 2, 3), noise[100:200])
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4)):
        assert abs(np.corrcoef(noise, sampler.gumbel(*other))[0, 1]) < 0.03


@pytest.mark.parametrize("strata", [None, [0, 1, 0, 1, 0, 0, 1]])
def test_gradient_of_the_log_probability_matches_finite_differences(strata):
    sampler = make_sampler(7, 3, strata)
    a, b, step = 1.7, 0.6, 1e-5
    drawn = sampler.draw(a, b, sampler.gumbel(0, 0, 0))

    def log_p(log_a, log_b):
        weights, total, end = sampler.log_weights(math.exp(log_a), math.exp(log_b)), 0.0, 0
        for stratum, count in enumerate(sampler.counts):
            members = np.flatnonzero(sampler.strata == stratum).tolist()
            sequence = [members.index(j) for j in drawn[end : end + count]]
            total += math.log(probability(weights[members], sequence))
            end += count
        return total

    x, y = math.log(a), math.log(b)
    expected = [
        (log_p(x + step, y) - log_p(x - step, y)) / (2 * step),
        (log_p(x, y + step) - log_p(x, y - step)) / (2 * step),
    ]
    np.testing.assert_allclose(sampler.log_probability_gradient(drawn, a, b), expected, rtol=1e-6)


def test_extreme_policies_stay_finite():
    sampler = make_sampler(1000, 900)
    for a, b in ((0.05, 50.0), (50.0, 0.05), (50.0, 50.0)):
        drawn = sampler.draw(a, b, sampler.gumbel(0, 0, 0))
        assert np.isfinite(sampler.log_probability_gradient(drawn, a, b)).all()


def test_rejects_a_total_that_leaves_a_class_empty():
    with pytest.raises(SubsetError, match="classes empty"):
        make_sampler(100, 1, [0] * 98 + [1] * 2)
