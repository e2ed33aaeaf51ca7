import numpy as np
import pytest

from kdfast.errors import DataError, SubsetError, UsageError
from kdfast.prune.rules import BALANCE, RULES, choose
from kdfast.prune.scores import SCORES, ScoreInputs, score

LABELS = np.repeat(np.arange(5), [10, 20, 30, 40, 100]).astype(np.int64)


@pytest.mark.parametrize("method", sorted(SCORES))
def test_scores_have_one_finite_number_a_sample(method: str) -> None:
    values = score(method, ScoreInputs(LABELS, seed=0))
    assert values.shape == LABELS.shape
    assert np.isfinite(values).all()


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("balance", BALANCE)
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25])
def test_sizes_are_exact(rule: str, balance: str, fraction: float) -> None:
    ids = choose(score("random", ScoreInputs(LABELS, 0)), LABELS, fraction, rule=rule, balance=balance)
    assert len(ids) == round(fraction * len(LABELS))
    assert len(np.unique(ids)) == len(ids)
    assert (np.diff(ids) > 0).all()


def test_balanced_keeps_proportions_and_equal_keeps_counts() -> None:
    scores = score("random", ScoreInputs(LABELS, 3))
    kept = choose(scores, LABELS, 0.2, balance="balanced")
    assert np.bincount(LABELS[kept]).tolist() == [2, 4, 6, 8, 20]
    kept = choose(scores, LABELS, 0.2, balance="equal")
    assert np.bincount(LABELS[kept]).tolist() == [8, 8, 8, 8, 8]


def test_hard_keeps_the_highest_scores_of_each_class() -> None:
    scores = np.random.default_rng(0).normal(size=len(LABELS))
    kept = choose(scores, LABELS, 0.2, rule="hard", balance="balanced")
    for label in range(5):
        members = np.flatnonzero(label == LABELS)
        best = set(members[np.argsort(-scores[members])[: int((LABELS[kept] == label).sum())]])
        assert set(kept[LABELS[kept] == label]) == best


def test_ties_are_broken_by_the_seed() -> None:
    constant = np.zeros(len(LABELS))
    first, again, other = (choose(constant, LABELS, 0.1, seed=s, balance="unbalanced") for s in (1, 1, 2))
    assert (first == again).all()
    assert (first != other).any()
    assert len(np.unique(LABELS[first])) > 1, "ties must not fall to the lowest indices"


def test_random_subsets_of_growing_size_are_nested() -> None:
    scores = score("random", ScoreInputs(LABELS, 5))
    small, large = (set(choose(scores, LABELS, f).tolist()) for f in (0.1, 0.3))
    assert small < large


def test_random_differs_between_seeds_and_is_uniform() -> None:
    n = 20_000
    labels = np.zeros(n, np.int64)
    first, second = (score("random", ScoreInputs(labels, s)) for s in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    counts = np.histogram(first, bins=20, range=(0, 1))[0]
    assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50  # chi-square, 19 degrees of freedom: p ~ 1e-4


def test_refusals() -> None:
    scores = score("random", ScoreInputs(LABELS, 0))
    with pytest.raises(UsageError, match="did you mean 'random'"):
        score("randon", ScoreInputs(LABELS, 0))
    with pytest.raises(DataError, match="3 of 200 scores are not finite"):
        choose(np.where(np.arange(200) < 3, np.nan, scores), LABELS, 0.1)
    with pytest.raises(DataError, match="199 scores for 200 samples"):
        choose(scores[1:], LABELS, 0.1)
    with pytest.raises(UsageError, match="rule"):
        choose(scores, LABELS, 0.1, rule="harder")
    with pytest.raises(SubsetError):
        choose(scores, LABELS, 0.01)  # 2 samples cannot hold 5 classes
    with pytest.raises(SubsetError):
        choose(scores, LABELS, 0.9, balance="equal")  # class 0 has 10 of the 36 it would need
