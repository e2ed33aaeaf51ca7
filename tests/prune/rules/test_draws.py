"""Strata match plain loops, and weighted draws follow their distributions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.rules.base import RuleInputs
from kdfast.pruning.rules.beta import mid_ranks
from kdfast.pruning.rules.ccs import default_cut, stratum_budgets
from kdfast.pruning.rules.draw import draw_weighted

LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [300, 150, 60, 30])).astype(np.int64)
SCORES = np.random.default_rng(1).gamma(2.0, size=len(LABELS))


def water_level(sizes: list[int], total: int) -> list[int]:
    """Give one sample at a time to the stratum with the fewest so far that has some left; return the sorted counts."""
    taken = [0] * len(sizes)
    for _ in range(total):
        open_ones = [i for i in range(len(sizes)) if taken[i] < sizes[i]]
        taken[min(open_ones, key=lambda i: taken[i])] += 1
    return sorted(taken)


@given(st.lists(st.integers(0, 12), min_size=1, max_size=8), st.data())
def test_stratum_budgets_are_as_equal_as_possible(sizes: list[int], data) -> None:
    total = data.draw(st.integers(0, sum(sizes)))
    budgets = stratum_budgets(np.array(sizes), total)
    assert budgets.sum() == total
    assert (budgets <= sizes).all()
    assert sorted(budgets.tolist()) == water_level(sizes, total)


def strata_by_hand(scores: np.ndarray, count: int, cut: float, number: int) -> tuple[set[int], list[int]]:
    """Return the samples that may be kept and the strata, following the CCS paper."""
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
def test_strata_match_plain_loops(fraction: float, balance: str) -> None:
    labels = LABELS if balance != "equal" else np.arange(len(LABELS)) % 4
    kept = select_subset(SCORES, labels, fraction, rule="strata", balance=balance, options={"strata": 7}).ids
    groups = [labels >= 0] if balance == "unbalanced" else [labels == label for label in range(4)]
    for group in groups:
        members = np.flatnonzero(group)
        mine = {int(np.searchsorted(members, i)) for i in kept if group[i]}
        allowed, bins = strata_by_hand(SCORES[members], len(mine), default_cut(fraction, 4), 7)
        assert mine <= allowed
        assert sorted(len(mine & set(b)) for b in bins) == water_level([len(b) for b in bins], len(mine))


def test_strata_budget_each_class_by_its_own_size() -> None:
    kept = select_subset(SCORES, LABELS, 0.1, rule="strata").ids
    assert np.bincount(LABELS[kept]).tolist() == [30, 15, 6, 3]


def test_strata_cut_the_hardest_but_keep_enough() -> None:
    labels = np.zeros(100, np.int64)
    scores = np.arange(100.0)
    assert select_subset(scores, labels, 0.1, rule="strata").ids.max() < 70, "a cut of .3 at f = .1"
    assert select_subset(scores, labels, 0.5, rule="strata").ids.max() > 90, "no cut from f = .5 on"
    everything_else = select_subset(scores, labels, 0.2, rule="strata", options={"cut": 0.95}).ids
    assert everything_else.tolist() == list(range(20)), "20 are to be kept: 80 may be cut, not 95"


@pytest.mark.parametrize(
    ("classes", "cuts"),
    [
        (10, {0.1: 0.3, 0.2: 0.1, 0.3: 0.1, 0.5: 0.0, 0.7: 0.0}),
        (100, {0.1: 0.5, 0.2: 0.4, 0.3: 0.2, 0.5: 0.2, 0.7: 0.1}),
        (1000, {0.1: 0.3, 0.2: 0.2, 0.3: 0.2, 0.5: 0.1, 0.7: 0.0}),
    ],
    ids=["CIFAR-10", "CIFAR-100", "ImageNet"],
)
def test_default_cuts_are_those_of_the_paper(classes: int, cuts: dict[float, float]) -> None:
    assert {fraction: default_cut(fraction, classes) for fraction in cuts} == pytest.approx(cuts)
    assert default_cut(0.02, classes) == default_cut(0.1, classes)
    assert default_cut(1.0, classes) == 0
    labels = np.arange(4000) % classes
    for fraction, cut in cuts.items():
        options = select_subset(np.arange(4000.0), labels, fraction, rule="strata", balance="unbalanced").options
        assert options["cut"] == pytest.approx(cut)


def public_ccs_counts(margin: np.ndarray, count: int, cut: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the samples the public code of CCS leaves after the cut, their strata, and the number kept of each."""
    left = np.argsort(margin)[int(cut * len(margin)) :]
    low, high = margin[left].min(), margin[left].max() * 1.0001
    edges = low + np.arange(51) * (high - low) / 50
    stratum = np.array([next(k for k in range(50) if edges[k] <= value < edges[k + 1]) for value in margin[left]])
    sizes = np.bincount(stratum, minlength=50)
    budgets, rest = np.zeros(50, int), count
    for done, k in enumerate(np.argsort(sizes, kind="stable")):
        budgets[k] = min(sizes[k], rest // (50 - done))
        rest -= budgets[k]
    return left, stratum, budgets


@pytest.mark.parametrize("fraction", [0.1, 0.3])
def test_strata_match_the_public_code_of_ccs(fraction: float) -> None:
    """Ranked together, the cut and the number kept of every stratum of the probability margin are the public code's."""
    rng = np.random.default_rng(2)
    levels = np.concatenate(([0.0, 50.0], rng.integers(0, 50, 3998) + 0.5))  # in the middle of a stratum, or at the end
    margin = np.where(rng.random(4000) < 0.5, levels, np.minimum(levels + 20, 49.5)) / 50
    margin[:2] = (0.0, 1.0)
    hard = rng.choice(np.arange(2, 4000), 1200 if fraction == 0.1 else 400, replace=False)
    margin[hard] = -rng.random(len(hard)) - 0.01
    labels = rng.integers(0, 10, 4000)
    labels[0] = 9
    kept = select_subset(-margin, labels, fraction, rule="strata", balance="unbalanced").ids
    left, stratum, budgets = public_ccs_counts(margin, len(kept), len(hard) / 4000)
    assert set(kept) <= set(left)
    of_sample = dict(zip(left.tolist(), stratum.tolist(), strict=True))
    counts = np.bincount([of_sample[i] for i in kept], minlength=50)
    assert np.abs(counts - budgets).max() <= 1, "strata of one size may differ in which of them gets a remainder"
    assert sorted(counts) == sorted(budgets)


def test_equal_scores_form_one_stratum() -> None:
    assert len(select_subset(np.full(60, 3.0), np.zeros(60, np.int64), 0.5, rule="strata").ids) == 30


def test_mid_ranks_share_ties_and_lie_inside_the_interval() -> None:
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
        pair = frozenset(draw_weighted(inputs, np.log(weights)).tolist())
        counts[pair] = counts.get(pair, 0) + 1 / draws
    return counts


def test_weighted_draw_follows_successive_draws_without_replacement() -> None:
    """Frequencies of all pairs agree with the enumerated probabilities of successive draws."""
    weights = np.array([1.0, 2.0, 3.0, 6.0])
    draws = 20_000
    expected: dict[frozenset[int], float] = {}
    for i, j in itertools.permutations(range(4), 2):
        p = weights[i] / 12 * weights[j] / (12 - weights[i])
        expected[frozenset((i, j))] = expected.get(frozenset((i, j)), 0) + p
    seen = drawn_pairs(weights, draws)
    for pair, p in expected.items():
        assert abs(seen.get(pair, 0) - p) < 4 * math.sqrt(p * (1 - p) / draws)


def test_draws_ignore_the_global_generator() -> None:
    """NumPy's global generator has no effect on the draw."""
    np.random.seed(1)  # noqa: NPY002
    first = select_subset(SCORES, LABELS, 0.2, rule="beta", options={"a": 2}).ids
    np.random.seed(2)  # noqa: NPY002
    assert (first == select_subset(SCORES, LABELS, 0.2, rule="beta", options={"a": 2}).ids).all()


def test_beta_draw_has_the_mean_of_its_density() -> None:
    n = 20_000
    scores, labels = np.arange(float(n)), np.zeros(n, np.int64)
    for a, b in ((1.0, 1.0), (2.0, 4.0), (6.0, 2.0)):
        ids = select_subset(scores, labels, 0.01, rule="beta", options={"a": a, "b": b}).ids
        deviation = math.sqrt(a * b / ((a + b) ** 2 * (a + b + 1)) / len(ids))
        assert abs(ids.mean() / n - a / (a + b)) < 4 * deviation


def test_beta_one_one_ignores_the_scores() -> None:
    first = select_subset(SCORES, LABELS, 0.2, rule="beta").ids
    assert (first == select_subset(SCORES[::-1], LABELS, 0.2, rule="beta").ids).all()


def test_draws_depend_on_samples_not_on_the_group() -> None:
    """A sample has the same noise in every group."""
    flat = np.zeros(len(LABELS))
    inputs = RuleInputs(flat, flat, 50, 0.1, 3, np.arange(len(LABELS)))
    everyone = draw_weighted(inputs, flat)
    part = np.sort(everyone)[::2]
    again = draw_weighted(RuleInputs(flat[part], flat[part], len(part), 0.1, 3, part), flat[part])
    assert part[again].tolist() == [i for i in everyone if i in set(part)]
