"""Mistakes found in public implementations of the scores, one test each."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.el2n_grand import compute_el2n
from kdfast.pruning.scores.registry import compute_score


def recorded(path, logits, labels, orders=None, features=None):
    """Record dynamics of one run from logits (E, N, C), given in each epoch's own order."""
    with DynamicsRecorder(path, len(labels), labels, epochs=len(logits),
                          feature_epochs=range(len(logits)) if features is not None else ()) as recorder:  # fmt: skip
        for epoch, rows in enumerate(logits):
            order = np.arange(len(labels)) if orders is None else orders[epoch]
            for ids in np.array_split(order, 7):
                recorder.update(ids, rows[ids], None if features is None else features[epoch][ids])
            recorder.end_epoch()
    return Dynamics.open(path)


@pytest.fixture
def random_logits():
    return np.random.default_rng(0).normal(0, 2, (6, 50, 4)).astype(np.float32)


LABELS = np.arange(50) % 4


def test_random_subsets_differ_between_seeds():
    subsets = [
        select_subset(compute_score("random", ScoreInputs(LABELS, seed)).values, LABELS, 0.2, seed=seed).ids
        for seed in range(4)
    ]
    assert len({tuple(ids) for ids in subsets}) == 4


def test_forgetting_ranks_never_learned_samples_hardest(tmp_path):
    logits = np.zeros((6, 50, 4), np.float32)
    logits[:, np.arange(50), LABELS] = 5
    logits[:, 7] = -logits[:, 7]  # never correct
    logits[::2, 9] *= -1  # correct every second epoch
    dynamics = recorded(tmp_path / "dyn", logits, LABELS)
    values = compute_score("forgetting", ScoreInputs(LABELS, 0, dynamics=dynamics)).values
    assert values.argmax() == 7
    assert values[7] > values[9] > values[0]
    zero = compute_score(
        "forgetting", ScoreInputs(LABELS, 0, dynamics=dynamics, options={"never_learned": "zero"})
    ).values
    assert zero[7] == 0
    assert zero.argmax() == 9


def test_forgetting_ties_are_broken_by_seed_not_by_index(tmp_path):
    labels = np.zeros(400, np.int64)
    dynamics = recorded(tmp_path / "dyn", np.tile([1.0, 0.0], (3, 400, 1)).astype(np.float32), labels)
    values = compute_score("forgetting", ScoreInputs(labels, 0, dynamics=dynamics)).values
    assert len(np.unique(values)) == 1
    first, second = (select_subset(values, labels, 0.5, seed=seed).ids for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, select_subset(values, labels, 0.5, seed=0).ids)
    assert 60 < (first < 200).sum() < 140


def test_grand_does_not_depend_on_the_batch(random_logits):
    """The norm of a sample is the same alone and in a batch."""
    features = np.random.default_rng(1).normal(0, 1, (50, 8)).astype(np.float32)
    whole = compute_score("grand", ScoreInputs(LABELS, 0, logits=random_logits[0], features=features)).values
    for i in (0, 48, 49):
        alone = ScoreInputs(LABELS[i : i + 1], 0, logits=random_logits[0, i : i + 1], features=features[i : i + 1])
        assert compute_score("grand", alone).values[0] == whole[i]


def test_grand_applies_softmax_once(random_logits):
    labels = torch.from_numpy(LABELS)
    logits = torch.from_numpy(random_logits[0]).double()
    once = (logits.softmax(1) - torch.nn.functional.one_hot(labels, 4)).norm(dim=1).numpy()
    twice = (logits.softmax(1).softmax(1) - torch.nn.functional.one_hot(labels, 4)).norm(dim=1).numpy()
    found = compute_el2n(random_logits[0], LABELS)
    np.testing.assert_allclose(found, once, rtol=1e-6)
    assert np.median(np.abs(found - twice)) > 0.05


def test_grand_does_not_materialize_gradients():
    """N x C x D values would take 800 MB here."""
    n, classes, width = 4000, 100, 512
    rng = np.random.default_rng(0)
    inputs = ScoreInputs(
        np.arange(n) % classes,
        0,
        logits=rng.normal(size=(n, classes)).astype(np.float32),
        features=rng.normal(size=(n, width)).astype(np.float32),
    )
    tracemalloc.start()
    compute_score("grand", inputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_el2n_does_not_depend_on_the_order_of_updates(tmp_path, random_logits):
    shuffled = [np.random.default_rng(epoch).permutation(50) for epoch in range(6)]
    straight = recorded(tmp_path / "a", random_logits, LABELS)
    mixed = recorded(tmp_path / "b", random_logits, LABELS, shuffled)
    for method in ("el2n", "aum", "forgetting"):
        values = [
            compute_score(method, ScoreInputs(LABELS, 0, dynamics=dynamics)).values for dynamics in (straight, mixed)
        ]
        assert np.array_equal(*values)
    assert compute_score("el2n", ScoreInputs(LABELS, 0, dynamics=mixed)).values[3] == pytest.approx(
        compute_el2n(random_logits[5, 3:4], LABELS[3:4])[0], rel=1e-3
    )


def test_memorization_has_a_standard_error(tmp_path, random_logits):
    for run in range(3):
        mask = np.arange(50) % 3 != run
        with DynamicsRecorder(tmp_path / "dyn", 50, LABELS, epochs=1, run=run, runs=3, mask=mask) as recorder:
            recorder.update(np.arange(50), random_logits[run])
            recorder.end_epoch()
    found = compute_score("memorization", ScoreInputs(LABELS, 0, dynamics=Dynamics.open(tmp_path / "dyn")))
    assert (found.extras["stderr"] > 0).all()
    assert (found.extras["stderr"] <= 1).all()


def test_moderate_keeps_the_middle_not_the_tails():
    rng = np.random.default_rng(0)
    labels = np.zeros(101, np.int64)
    features = rng.normal(0, 1, (101, 6)).astype(np.float32)
    values = compute_score(
        "moderate", ScoreInputs(labels, 0, logits=np.zeros((101, 1), np.float32), features=features)
    ).values
    kept = select_subset(values, labels, 0.3, rule="moderate").ids
    dropped = np.setdiff1d(np.arange(101), kept)
    median = np.median(values)
    assert np.abs(values[kept] - median).max() <= np.abs(values[dropped] - median).max()
    assert values[kept].min() > np.quantile(values, 0.3)
    assert values[kept].max() < np.quantile(values, 0.7)


def head_problem(n=160, seed=0):
    """Return features and labels of three overlapping classes, and the indices of wrong labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    features = (rng.normal(0, 1, (n, 5)) + 1.5 * np.eye(3, 5)[labels]).astype(np.float32)
    wrong = rng.choice(n, n // 10, replace=False)
    labels[wrong] = (labels[wrong] + 1) % 3
    return features, labels, wrong


def test_influence_matches_retraining():
    """Predicted changes of the held-out loss agree in size and sign with retraining without the sample."""
    from kdfast.ops.softmax_head import head_newton
    from kdfast.pruning.scores.influence import draw_holdout

    l2 = 0.02
    features, labels, _ = head_problem()
    options = {"l2": l2, "holdout": 0.3}
    inputs = ScoreInputs(labels, 0, logits=np.zeros((160, 3), np.float32), features=features, options=options)
    found = compute_score("influence", inputs).values
    first, second = draw_holdout(labels, 0.3, 0)
    x = torch.from_numpy(features).double()
    y = torch.from_numpy(labels)

    def held_loss(trained, held):
        """Train without a sample but divide by the old count, which is the same as rescaling the penalty."""
        scale = len(trained) / (160 - len(held))
        w = head_newton(x[trained], y[trained], l2=l2 / scale)
        return float(torch.nn.functional.cross_entropy(x[held] @ w[:, :-1].T + w[:, -1], y[held]))

    checked = np.setdiff1d(np.arange(160), np.concatenate([first, second]))[:25]
    changes = []
    for i in checked:
        rise = [
            held_loss(np.setdiff1d(np.arange(160), [*held, i]), held)
            - held_loss(np.setdiff1d(np.arange(160), held), held)
            for held in (first, second)
        ]
        changes.append(np.mean(rise))
    assert np.corrcoef(changes, found[checked])[0, 1] > 0.98
    large = np.abs(changes) > np.quantile(np.abs(changes), 0.3)
    assert (np.sign(np.array(changes)[large]) == np.sign(found[checked][large])).all()


def test_influence_separates_mislabelled_samples():
    features, labels, wrong = head_problem(n=600)
    clean = np.setdiff1d(np.arange(600), wrong)
    base = {"labels": labels, "seed": 0, "logits": np.zeros((600, 3), np.float32), "features": features}
    removal = compute_score("influence", ScoreInputs(**base, options={"l2": 0.02})).values
    own = compute_score("influence", ScoreInputs(**base, options={"l2": 0.02, "kind": "self"})).values
    assert removal[wrong].mean() < 0 < removal[clean].mean()
    assert np.median(own[wrong]) > np.quantile(own[clean], 0.8)


def test_influence_does_not_read_the_test_split(tmp_path):
    """Influence never reads the test split."""
    from kdfast.data.source import ArraySplit, Source, default_view_spec
    from kdfast.pruning.scores.compute import ScoreSources

    class Untouchable:
        shape = (8, 8, 3)
        labels = np.zeros(1, np.int64)

        def read(self, ids):
            raise AssertionError("the test split was read")

        def __len__(self):
            raise AssertionError("the length of the test split was read")

    features, labels, _ = head_problem()
    split = ArraySplit(np.zeros((160, 8, 8, 3), np.uint8), labels, "images")
    source = Source("memory", "npz", ("a", "b", "c"), split, Untouchable(), default_view_spec((8, 8, 3), flip=False))
    given = ScoreSources.open(source).inputs("influence", seed=0, options={"l2": 0.02})
    inputs = dataclasses.replace(given, logits=np.zeros((160, 3), np.float32), features=features)
    assert np.isfinite(compute_score("influence", inputs).values).all()
