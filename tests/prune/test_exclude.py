"""Subsets that may not contain the samples of another one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import kdfast
from kdfast.data.stateless_random import Purpose, hash64
from kdfast.errors import SubsetError
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.rules.registry import RULES

N, CLASSES = 300, 5
RNG = np.random.default_rng(0)
LABELS = RNG.permutation(np.arange(N) % CLASSES)
SCORES = RNG.permutation(np.linspace(0, 1, N))
FEATURES = RNG.normal(size=(N, 8)).astype(np.float32)
EXTRAS = {"mean_p": RNG.random(N)}
EXCLUDED = RNG.permutation(N)[:180]
REST = np.setdiff1d(np.arange(N), EXCLUDED)
# Rules without draws, to which the other samples may as well not exist.
RANKS = ("hard", "easy", "moderate", "d2", "bws")


def pick(rule: str, fraction: float = 0.2, **how) -> np.ndarray:
    return select_subset(SCORES, LABELS, fraction, rule=rule, features=FEATURES, extras=EXTRAS, **how).ids


@pytest.mark.parametrize("balance", ["balanced", "equal", "unbalanced"])
@pytest.mark.parametrize("rule", sorted(RULES))
def test_rules_keep_the_share_of_all_samples_from_the_others(rule: str, balance: str) -> None:
    kept = pick(rule, balance=balance, exclude=EXCLUDED)
    assert len(kept) == 60
    assert (np.diff(kept) > 0).all()
    assert not np.isin(kept, EXCLUDED).any()
    if balance == "equal":
        assert np.bincount(LABELS[kept]).tolist() == [12] * CLASSES


@pytest.mark.parametrize("rule", RANKS)
def test_ranks_are_those_of_the_others_alone(rule: str) -> None:
    alone = select_subset(SCORES[REST], LABELS[REST], 60 / len(REST), rule=rule, features=FEATURES[REST])
    assert np.array_equal(pick(rule, exclude=EXCLUDED), REST[alone.ids])


class Counted(np.ndarray):
    """Rows that count how many are copied at a time."""

    most = 0

    def __getitem__(self, key):
        found = np.asarray(super().__getitem__(key))
        if isinstance(key, np.ndarray):
            Counted.most = max(Counted.most, len(found))
        return found


def test_rows_of_a_class_are_copied_and_not_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdfast.data.arrays._GROUP_BYTES", 1)
    monkeypatch.setattr("kdfast.pruning.rules.apply.as_matrix", lambda values, n, what: FEATURES.view(Counted))
    assert np.array_equal(pick("d2", exclude=EXCLUDED), pick("d2", exclude=EXCLUDED[::-1]))
    assert 0 < Counted.most <= np.bincount(LABELS[REST]).max()


def test_random_keeps_the_lowest_draws_of_the_others() -> None:
    kept = kdfast.prune(LABELS, 0.2, balance="unbalanced", seed=4, exclude=EXCLUDED)
    draws = hash64(Purpose.SCORE, 4, REST)
    assert np.array_equal(kept, np.sort(REST[np.argsort(draws)[-60:]]))


def test_indices_masks_and_files_mean_the_same(tmp_path: Path) -> None:
    np.save(tmp_path / "idx.npy", EXCLUDED)
    mask = np.isin(np.arange(N), EXCLUDED)
    first, *others = (kdfast.prune(LABELS, 0.2, exclude=how) for how in (EXCLUDED, mask, tmp_path / "idx.npy"))
    assert all(np.array_equal(first, other) for other in others)
    assert np.array_equal(kdfast.prune(LABELS, 0.4, exclude=EXCLUDED), REST), "all that remain"


@pytest.mark.parametrize(
    ("fraction", "exclude", "message"),
    [
        (0.5, EXCLUDED, r"`fraction` is 0\.5, 150 of 300 samples, and `exclude` leaves 120: keep fewer"),
        (0.1, np.flatnonzero(LABELS == 2), r"`exclude` holds all samples of 1 classes, such as class 2"),
        (0.1, np.array([N]), r"`exclude` has indices past the end, such as 300"),
        (0.1, np.array([4, 4]), r"`exclude` repeats 1 indices"),
    ],
)
def test_impossible_exclusions_are_refused(fraction: float, exclude: np.ndarray, message: str) -> None:
    with pytest.raises(SubsetError, match=message):
        kdfast.prune(LABELS, fraction, exclude=exclude)
    if "all samples" in message:
        assert len(kdfast.prune(LABELS, fraction, exclude=exclude, balance="unbalanced")) == 30


def test_a_learned_density_draws_from_the_others() -> None:
    noise = np.random.default_rng(1).normal(size=(N, CLASSES))
    logits = (np.eye(CLASSES)[LABELS] + noise).astype(np.float32)
    options = {"steps": 2, "inner_steps": 5}
    kept = kdfast.prune(
        LABELS, 0.2, method="if-beta", logits=logits, features=FEATURES, options=options, exclude=EXCLUDED
    )
    alone = kdfast.prune(
        LABELS[REST], 0.5, method="if-beta", logits=logits[REST], features=FEATURES[REST], options=options
    )
    assert np.array_equal(kept, REST[alone])
