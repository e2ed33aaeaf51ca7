"""Strata and the rules that draw with weights: against plain loops, and against the distributions they promise."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdfast.prune.rules.base import RuleInputs
from kdfast.prune.rules.ccs import default_cut, stratum_budgets
from kdfast.prune.rules.rank import mid_ranks, weighted_draw
from kdfast.prune.rules.registry import choose

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [300, 150, 60, 30])).astype(np.int64)
SCORES = np.random.default_rng(1).gamma(2.0, size=len(LABELS))


def water_level(sizes: list[int], total: int) -> list[int]:
    """One sample at a time to a stratum that has had least and has some left: the levels equal parts must reach."""
    taken = [0] * len(sizes)
    for _ in range(total):
        open_ones = [i for i in range(len(sizes)) if taken[i] < sizes[i]]
        taken[min(open_ones, key=lambda i: taken[i])] += 1
    return sorted(taken)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.data())
def test_budgets_of_strata_are_equal_with_the_leftover_spread(sizes: list[int], data) -> None:
    total = data.draw(st.integers(0, sum(sizes)))
    budgets = stratum_budgets(np.array(sizes), total)
    assert budgets.sum() == total
    assert (budgets <= sizes).all()
    assert sorted(budgets.tolist()) == water_level(sizes, total)


def strata_by_hand(scores: np.ndarray, count: int, cut: float, number: int) -> tuple[set[int], list[int]]:
    """The samples that may be kept, and how many of each stratum: CCS as its paper tells it."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    left = order[min(round(cut * len(scores)), len(scores) - count) :]
    low, high = min(scores[left]), max(scores[left])
    width = (high - low) / number
    bins: list[list[int]] = [[] for _ in range(number)]
    for i in left:
        bins[min(int((scores[i] - low) / width), number - 1)].append(i)
    return set(left), bins


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("balance", ["balanced", "unbalanced", "equal"])
def test_strata_against_plain_loops(fraction: float, balance: str) -> None:
    labels = LABELS if balance != "equal" else np.arange(len(LABELS)) % 4
    kept = choose(SCORES, labels, fraction, rule="strata", balance=balance, options={"strata": 7})
    groups = [labels >= 0] if balance == "unbalanced" else [labels == label for label in range(4)]
    for group in groups:
        members = np.flatnonzero(group)
        mine = {int(np.searchsorted(members, i)) for i in kept if group[i]}
        allowed, bins = strata_by_hand(SCORES[members], len(mine), default_cut(fraction), 7)
        assert mine <= allowed
        assert sorted(len(mine & set(b)) for b in bins) == water_level([len(b) for b in bins], len(mine))


def test_class_balance_of_ccs_is_each_classes_own_and_not_the_last_ones() -> None:
    kept = choose(SCORES, LABELS, 0.1, rule="strata")
    assert np.bincount(LABELS[kept]).tolist() == [30, 15, 6, 3]


def test_the_hardest_are_cut_first_and_never_too_many() -> None:
    labels = np.zeros(100, np.int64)
    scores = np.arange(100.0)
    assert choose(scores, labels, 0.1, rule="strata").max() < 70, "a cut of .3 at f = .1"
    assert choose(scores, labels, 0.5, rule="strata").max() > 90, "no cut from f = .5 on"
    everything_else = choose(scores, labels, 0.2, rule="strata", options={"cut": 0.95})
    assert everything_else.tolist() == list(range(20)), "20 are to be kept: 80 may be cut, not 95"


def test_strata_of_equal_scores_are_one_stratum() -> None:
    assert len(choose(np.full(60, 3.0), np.zeros(60, np.int64), 0.5, rule="strata")) == 30


def test_ranks_share_ties_and_lie_inside_the_interval() -> None:
    scores = np.array([5.0, 1.0, 5.0, 2.0])
    assert mid_ranks(scores).tolist() == [0.75, 0.125, 0.75, 0.375]
    from scipy.stats import rankdata

    many = np.random.default_rng(0).integers(0, 9, 100).astype(float)
    np.testing.assert_allclose(mid_ranks(many), (rankdata(many) - 0.5) / 100)


def drawn_pairs(weights: np.ndarray, draws: int) -> dict[frozenset[int], float]:
    counts: dict[frozenset[int], float] = {}
    n = len(weights)
    for seed in range(draws):
        inputs = RuleInputs(np.zeros(n), np.arange(n) / n, 2, 0.5, seed, np.arange(n))
        pair = frozenset(weighted_draw(inputs, np.log(weights)).tolist())
        counts[pair] = counts.get(pair, 0) + 1 / draws
    return counts


def test_the_draw_is_without_replacement_and_in_proportion_to_what_is_left() -> None:
    """Frequencies of all pairs against the probabilities of successive draws, enumerated."""
    weights = np.array([1.0, 2.0, 3.0, 6.0])
    draws = 20_000
    expected: dict[frozenset[int], float] = {}
    for i, j in itertools.permutations(range(4), 2):
        p = weights[i] / 12 * weights[j] / (12 - weights[i])
        expected[frozenset((i, j))] = expected.get(frozenset((i, j)), 0) + p
    seen = drawn_pairs(weights, draws)
    for pair, p in expected.items():
        assert abs(seen.get(pair, 0) - p) < 4 * math.sqrt(p * (1 - p) / draws)


def test_unseeded_sampling_is_not_what_happens() -> None:
    """The draw depends on the arguments alone, whatever numpy's global generator holds."""
    np.random.seed(1)  # noqa: NPY002
    first = choose(SCORES, LABELS, 0.2, rule="beta", options={"a": 2})
    np.random.seed(2)  # noqa: NPY002
    assert (first == choose(SCORES, LABELS, 0.2, rule="beta", options={"a": 2})).all()


def test_beta_moves_the_mass_where_its_density_lies() -> None:
    n = 20_000
    scores, labels = np.arange(float(n)), np.zeros(n, np.int64)
    for a, b in ((1.0, 1.0), (2.0, 4.0), (6.0, 2.0)):
        ids = choose(scores, labels, 0.01, rule="beta", options={"a": a, "b": b})
        deviation = math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)) / len(ids))
        assert abs(ids.mean() / n - a / (a + b)) < 4 * deviation


def test_beta_of_one_and_one_is_uniform_over_the_samples_whatever_their_scores() -> None:
    first = choose(SCORES, LABELS, 0.2, rule="beta")
    assert (first == choose(SCORES[::-1], LABELS, 0.2, rule="beta")).all()


def test_draws_belong_to_samples_and_not_to_positions_in_a_group() -> None:
    """A sample's noise is the same whatever group it is drawn from."""
    flat = np.zeros(len(LABELS))
    inputs = RuleInputs(flat, flat, 50, 0.1, 3, np.arange(len(LABELS)))
    everyone = weighted_draw(inputs, flat)
    part = np.sort(everyone)[::2]
    again = weighted_draw(RuleInputs(flat[part], flat[part], len(part), 0.1, 3, part), flat[part])
    assert part[again].tolist() == [i for i in everyone if i in set(part)]
