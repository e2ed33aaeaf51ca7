"""Every rule: sizes, budgets, seeds and errors; rank rules also match brute force."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.data.subset import class_budgets
from kdfast.errors import DataError, SubsetError, UsageError
from kdfast.pruning.options import complete_options
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.rules.base import RuleInputs
from kdfast.pruning.rules.class_budget import BALANCE
from kdfast.pruning.rules.registry import RULES
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score

BALANCED = np.tile(np.arange(5), 40).astype(np.int64)
UNBALANCED = np.repeat(np.arange(4), [300, 150, 60, 30]).astype(np.int64)  # 10 : 1
LABELS = {"balanced": BALANCED, "1:10": UNBALANCED}
SHUFFLED = {name: np.random.default_rng(5).permutation(labels) for name, labels in LABELS.items()}


def inputs_of(labels: np.ndarray, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return {
        "scores": rng.random(len(labels)) * 3,
        "features": rng.normal(size=(len(labels), 6)).astype(np.float32),
        "extras": {"mean_p": rng.random(len(labels))},
    }


def pick(labels: np.ndarray, fraction: float, **changes) -> np.ndarray:
    arguments = {**inputs_of(labels), **changes}
    return select_subset(arguments.pop("scores"), labels, fraction, **arguments).ids


@pytest.fixture(params=sorted(SHUFFLED))
def labels(request) -> np.ndarray:
    return SHUFFLED[request.param]


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("balance", BALANCE)
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.2])
def test_sizes_are_exact(labels, rule: str, balance: str, fraction: float) -> None:
    ids = pick(labels, fraction, rule=rule, balance=balance)
    assert len(ids) == round(fraction * len(labels))
    assert ids.dtype == np.int64
    assert (np.diff(ids) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < len(labels)


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("balance", ["balanced", "equal"])
def test_class_budgets_are_met_on_unbalanced_data(labels, rule: str, balance: str) -> None:
    ids = pick(labels, 0.1, rule=rule, balance=balance)
    sizes, total = np.bincount(labels), len(ids)
    exact = total * sizes / len(labels) if balance == "balanced" else np.full(len(sizes), total / len(sizes))
    assert (np.abs(np.bincount(labels[ids]) - exact) < 1).all()


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("balance", BALANCE)
def test_keeps_all_or_nearly_all_samples(labels, rule: str, balance: str) -> None:
    assert (pick(labels, 1.0, rule=rule, balance=balance) == np.arange(len(labels))).all()
    assert len(pick(labels, 0.95, rule=rule, balance=balance)) == round(0.95 * len(labels))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_only_drawing_rules_depend_on_the_seed(labels, rule: str) -> None:
    first, again, other = (pick(labels, 0.2, rule=rule, seed=seed) for seed in (1, 1, 2))
    assert (first == again).all()
    if rule in ("random", "strata", "beta", "dual"):
        overlap = len(np.intersect1d(first, other)) / len(first)
        assert overlap < 0.6, "another seed must draw another subset"
    else:
        assert (first == other).all(), "distinct scores leave nothing to the seed"


@pytest.mark.parametrize("rule", sorted(RULES))
def test_ties_are_broken_by_seed_not_by_index(rule: str) -> None:
    n = 400
    constant = {"scores": np.ones(n), "features": np.ones((n, 2), np.float32), "extras": {"mean_p": np.full(n, 0.5)}}
    labels = np.zeros(n, np.int64)
    first, other = (pick(labels, 0.25, rule=rule, seed=seed, **constant) for seed in (1, 2))
    assert (first != other).any()
    for ids in (first, other):
        assert 0.3 < (ids < n // 2).mean() < 0.7, "ties must not fall to one end of the data set"


@pytest.mark.parametrize("rule", ["hard", "easy", "moderate", "strata", "d2", "bws"])
def test_rules_are_invariant_to_a_factor(labels, rule: str) -> None:
    plain = inputs_of(labels)
    scaled = {**plain, "scores": plain["scores"] * 64}  # exact in binary
    assert (pick(labels, 0.2, rule=rule, **plain) == pick(labels, 0.2, rule=rule, **scaled)).all()


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("sizes", [[1], [2], [3], [1, 1, 1], [1, 5, 1], [2] * 25], ids=str)
def test_tiny_classes_and_duplicate_samples(rule: str, sizes: list[int]) -> None:
    """Equal scores, features and extras: each class still has its budget, and a single sample is kept."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    n = len(labels)
    same = {"scores": np.zeros(n), "features": np.ones((n, 2)), "extras": {"mean_p": np.full(n, 0.5)}}
    assert (pick(labels, 1.0, rule=rule, **same) == np.arange(n)).all()
    fraction = max(0.5, len(sizes) / n)
    for balance in ("balanced", "equal"):
        kept = np.bincount(labels[pick(labels, fraction, rule=rule, balance=balance, **same)], minlength=len(sizes))
        mode = "equal" if balance == "equal" else "proportional"
        assert kept.tolist() == class_budgets(labels, max(1, round(fraction * n)), mode).tolist()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_returned_options_reproduce_the_selection(labels, rule: str) -> None:
    inputs = inputs_of(labels)
    scores = inputs.pop("scores")
    choice = select_subset(scores, labels, 0.2, rule=rule, **inputs)
    assert set(choice.options) == set(RULES[rule].options)
    assert None not in choice.options.values()
    again = select_subset(scores, labels, 0.2, rule=rule, options=choice.options, **inputs)
    assert (again.ids == choice.ids).all()
    assert again.options == choice.options


def test_automatic_options_are_returned_with_their_values(labels) -> None:
    inputs = inputs_of(labels)
    scores = inputs.pop("scores")
    options = {
        rule: select_subset(scores, labels, 0.1, rule=rule, **inputs).options for rule in ("strata", "d2", "dual")
    }
    assert options["strata"]["cut"] == pytest.approx(0.3)
    assert options["d2"]["cut"] == pytest.approx(0.4)
    assert options["dual"]["c"] == 5.5
    assert options["dual"]["mu"] == pytest.approx(inputs["extras"]["mean_p"][np.argsort(-scores)[:10]].mean())
    assert select_subset(scores, labels, 0.1, rule="dual", options={"mu": 0.25}, **inputs).options["mu"] == 0.25


def brute(scores: np.ndarray, count: int, rule: str) -> set[int]:
    """Select by repeated search instead of a sort."""
    left = dict(enumerate(scores.tolist()))
    if rule in ("hard", "easy"):
        return set(_best(left, count, max if rule == "hard" else min))
    drop = len(left) - count
    for key in _best(left, drop // 2, min):
        del left[key]
    for key in _best(left, drop - drop // 2, max):
        del left[key]
    return set(left)


def _best(table: dict[int, float], count: int, best) -> list[int]:
    rest, found = dict(table), []
    for _ in range(count):
        key = best(rest, key=rest.__getitem__)
        found.append(key)
        del rest[key]
    return found


@pytest.mark.parametrize("rule", ["hard", "easy", "moderate"])
@pytest.mark.parametrize("fraction", [0.1, 0.33, 0.5])
def test_rank_rules_match_brute_force_in_every_class(labels, rule: str, fraction: float) -> None:
    scores = inputs_of(labels)["scores"]
    kept = pick(labels, fraction, rule=rule)
    budgets = class_budgets(labels, len(kept))
    for label, budget in enumerate(budgets):
        members = np.flatnonzero(labels == label)
        expected = {int(members[i]) for i in brute(scores[members], int(budget), rule)}
        assert set(kept[labels[kept] == label].tolist()) == expected
    everyone = pick(labels, fraction, rule=rule, balance="unbalanced")
    assert set(everyone.tolist()) == brute(scores, len(everyone), rule)


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.7])
def test_moderate_without_class_budgets_matches_the_public_code(fraction: float) -> None:
    """The public code ranks the distances to the class medians of all samples together, and drops both tails."""
    rng = np.random.default_rng(4)
    labels = rng.permutation(np.repeat(np.arange(4), [200, 100, 60, 40]))
    features = rng.normal(size=(400, 5)) * (1 + labels[:, None]) + labels[:, None]
    features = features.astype(np.float32)
    inputs = ScoreInputs(labels, 0, np.zeros((400, 4)), features, options={"fidelity": "code"})
    distances = compute_score("moderate", inputs).values
    kept = select_subset(distances, labels, fraction, rule="moderate", balance="unbalanced").ids
    medians = np.array([np.median(features[labels == c], axis=0) for c in range(4)])
    order = np.linalg.norm(features - medians[labels], axis=1).argsort()
    low, high = round(400 * (0.5 - fraction / 2)), round(400 * (0.5 + fraction / 2))
    assert set(kept.tolist()) == set(order[low:high].tolist())
    assert len(np.unique(np.bincount(labels[kept], minlength=4) / [200, 100, 60, 40])) > 1, "classes have no budgets"


def test_moderate_keeps_the_middle() -> None:
    scores = np.arange(100.0)
    ids = select_subset(scores, np.zeros(100, np.int64), 0.2, rule="moderate").ids
    assert ids.tolist() == list(range(40, 60))


def test_random_rule_equals_the_random_score_and_nests(labels) -> None:
    by_score = compute_score("random", ScoreInputs(labels, 3)).values
    assert (select_subset(by_score, labels, 0.2, seed=3).ids == pick(labels, 0.2, rule="random", seed=3)).all()
    small, large = (set(pick(labels, f, rule="random", seed=3).tolist()) for f in (0.1, 0.3))
    assert small < large


def test_random_score_is_uniform_and_differs_between_seeds() -> None:
    n = 20_000
    first, second = (compute_score("random", ScoreInputs(np.zeros(n, np.int64), s)).values for s in (0, 1))
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    counts = np.histogram(first, bins=20, range=(0, 1))[0]
    assert ((counts - n / 20) ** 2 / (n / 20)).sum() < 50  # chi-square, 19 degrees of freedom: p ~ 1e-4


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_keeps_the_exact_number_for_any_scores_and_labels(data) -> None:
    sizes = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=5))
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)
    n = len(labels)
    # Few distinct values, so that ties are common.
    scores = np.array(data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.25]), min_size=n, max_size=n)))
    rule = data.draw(st.sampled_from(sorted(set(RULES) - {"d2", "bws"})))
    balance = data.draw(st.sampled_from(BALANCE))
    fraction = data.draw(st.floats(1 / n, 1))
    extras = {"mean_p": np.linspace(0, 1, n)}
    try:
        ids = select_subset(scores, labels, fraction, rule=rule, balance=balance, extras=extras).ids
    except SubsetError:
        assert balance != "unbalanced" or round(fraction * n) == 0
        return
    assert len(np.unique(ids)) == round(fraction * n)
    if balance == "unbalanced" and rule == "hard":
        assert np.delete(scores, ids).max(initial=-1) <= scores[ids].min()
    if balance == "unbalanced" and rule == "easy":
        assert np.delete(scores, ids).min(initial=99) >= scores[ids].max()


def test_classes_are_selected_independently(labels) -> None:
    """The selection from a class depends only on its own samples."""
    plain = inputs_of(labels)
    other = np.where(labels == 0, plain["scores"], plain["scores"][::-1])
    for rule in sorted(set(RULES) - {"dual", "bws"}):
        first, second = (pick(labels, 0.2, rule=rule, **{**plain, "scores": s}) for s in (plain["scores"], other))
        assert (first[labels[first] == 0] == second[labels[second] == 0]).all(), rule


def test_rejects_bad_scores_features_fractions_and_balance(labels) -> None:
    scores = inputs_of(labels)["scores"]
    n = len(labels)
    with pytest.raises(DataError, match=f"3 of {n} scores are not finite"):
        pick(labels, 0.1, scores=np.where(np.arange(n) < 3, np.nan, scores))
    with pytest.raises(DataError, match=rf"scores are float64 of shape \({n - 1},\): pass finite numbers \({n},\)"):
        pick(labels, 0.1, scores=scores[1:])
    with pytest.raises(DataError, match="mean_p are not finite"):
        pick(labels, 0.1, rule="dual", extras={"mean_p": np.full(n, np.inf)})
    with pytest.raises(DataError, match=rf"features are float32 of shape \(3, 2\) for {n} samples"):
        pick(labels, 0.1, rule="d2", features=np.ones((3, 2), np.float32))
    with pytest.raises(SubsetError, match="keeps none"):
        pick(labels, 1e-6)
    with pytest.raises(SubsetError, match="classes empty"):
        pick(labels, 2 / n)
    with pytest.raises(UsageError, match="balance 'fair'"):
        pick(labels, 0.1, balance="fair")


def test_equal_budgets_keep_all_of_a_smaller_class() -> None:
    sizes, kept = np.bincount(UNBALANCED), np.bincount(UNBALANCED[pick(UNBALANCED, 0.4, balance="equal")])
    small = sizes < kept.max()
    assert small.any()
    assert (kept[small] == sizes[small]).all()
    assert np.ptp(kept[~small]) <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rule": "strat"}, "did you mean 'strata'"),
        ({"rule": "strata", "options": {"srata": 3}}, "no option 'srata': did you mean 'strata'"),
        ({"rule": "hard", "options": {"k": 3}}, "no option 'k': known: none"),
        ({"rule": "strata", "options": {"strata": 2.5}}, "whole number"),
        ({"rule": "strata", "options": {"cut": "much"}}, "must be a number"),
        ({"rule": "strata", "options": {"cut": 1.5}}, "from 0 to 1"),
        ({"rule": "beta", "options": {"a": float("nan")}}, "from 0.001"),
        ({"rule": "d2", "options": {"fidelity": "exact"}}, "one of paper, code"),
        ({"rule": "d2", "features": None}, "needs the features of a teacher's cache"),
        ({"rule": "dual", "extras": {}}, "needs the mean probability"),
    ],
)
def test_rejects_unknown_names_bad_options_and_missing_inputs(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        pick(BALANCED, 0.1, **changes)


def test_options_as_text_are_options_as_numbers() -> None:
    text, number = ({"a": "3", "b": "1.5"}, {"a": 3, "b": 1.5})
    first, second = (pick(BALANCED, 0.2, rule="beta", options=options) for options in (text, number))
    assert (first == second).all()


@pytest.mark.parametrize("rule", sorted(RULES))
def test_rule_returns_distinct_positions_in_its_group(rule: str) -> None:
    """A rule maps a group to positions in it, as `select_subset` expects."""
    n = 50
    given = inputs_of(np.zeros(n, np.int64))
    inputs = RuleInputs(
        scores=given["scores"],
        ties=np.random.default_rng(1).random(n),
        count=20,
        fraction=0.4,
        seed=0,
        ids=np.arange(1000, 1000 + n),
        features=given["features"],
        extras=given["extras"],
        options=complete_options(rule, RULES[rule].options, {}),
        labels=np.zeros(n, np.int64),
    )
    chosen = RULES[rule]
    inputs = chosen.with_defaults(inputs)
    positions = chosen(inputs)
    assert positions.dtype == np.int64
    assert len(np.unique(positions)) == 20
    assert set(positions.tolist()) <= set(range(n))
    assert len(chosen(replace(inputs, count=0))) == 0
