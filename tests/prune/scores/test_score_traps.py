"""What goes wrong in public implementations of the scores, a test by name for each."""

import dataclasses
import tracemalloc

import numpy as np
import pytest
import torch

from kdfast.dynamics.reader import Dynamics, DynamicsRecorder
from kdfast.prune.rules.registry import choose
from kdfast.prune.scores.hardness import residual_norms
from kdfast.prune.scores.registry import ScoreInputs, score


def recorded(path, logits, labels, orders=None, features=None):
    """Dynamics of one run from logits (E, N, C), given in each epoch's own order."""
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


def test_random_one_subset_reused_for_every_seed():
    subsets = [choose(score("random", ScoreInputs(LABELS, seed)).values, LABELS, 0.2, seed=seed) for seed in range(4)]
    assert len({tuple(ids) for ids in subsets}) == 4


def test_forgetting_never_learned_samples_pruned_first(tmp_path):
    logits = np.zeros((6, 50, 4), np.float32)
    logits[:, np.arange(50), LABELS] = 5
    logits[:, 7] = -logits[:, 7]  # never right
    logits[::2, 9] *= -1  # right every second epoch
    dynamics = recorded(tmp_path / "dyn", logits, LABELS)
    values = score("forgetting", ScoreInputs(LABELS, 0, dynamics=dynamics)).values
    assert values.argmax() == 7
    assert values[7] > values[9] > values[0]
    zero = score("forgetting", ScoreInputs(LABELS, 0, dynamics=dynamics, options={"never_learned": "zero"})).values
    assert zero[7] == 0
    assert zero.argmax() == 9


def test_forgetting_ties_are_broken_by_the_seed_and_not_by_the_index(tmp_path):
    labels = np.zeros(400, np.int64)
    dynamics = recorded(tmp_path / "dyn", np.tile([1.0, 0.0], (3, 400, 1)).astype(np.float32), labels)
    values = score("forgetting", ScoreInputs(labels, 0, dynamics=dynamics)).values
    assert len(np.unique(values)) == 1
    first, second = (choose(values, labels, 0.5, seed=seed) for seed in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, choose(values, labels, 0.5, seed=0))
    assert 60 < (first < 200).sum() < 140


def test_grand_batch_mean_inflates_the_short_last_batch(random_logits):
    """A sample's norm does not depend on what it shares a batch with: all samples alone, or together."""
    features = np.random.default_rng(1).normal(0, 1, (50, 8)).astype(np.float32)
    whole = score("grand", ScoreInputs(LABELS, 0, logits=random_logits[0], features=features)).values
    for i in (0, 48, 49):
        alone = ScoreInputs(LABELS[i : i + 1], 0, logits=random_logits[0, i : i + 1], features=features[i : i + 1])
        assert score("grand", alone).values[0] == whole[i]


def test_grand_softmax_applied_twice(random_logits):
    labels = torch.from_numpy(LABELS)
    logits = torch.from_numpy(random_logits[0]).double()
    once = (logits.softmax(1) - torch.nn.functional.one_hot(labels, 4)).norm(dim=1).numpy()
    twice = (logits.softmax(1).softmax(1) - torch.nn.functional.one_hot(labels, 4)).norm(dim=1).numpy()
    found = residual_norms(random_logits[0], LABELS)
    np.testing.assert_allclose(found, once, rtol=1e-6)
    assert np.median(np.abs(found - twice)) > 0.05


def test_grand_materialises_every_gradient():
    """N x C x D numbers would be 1.6 GB here."""
    n, classes, width = 4000, 100, 512
    rng = np.random.default_rng(0)
    inputs = ScoreInputs(
        np.arange(n) % classes,
        0,
        logits=rng.normal(size=(n, classes)).astype(np.float32),
        features=rng.normal(size=(n, width)).astype(np.float32),
    )
    tracemalloc.start()
    score("grand", inputs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6


def test_el2n_indices_in_another_data_order(tmp_path, random_logits):
    shuffled = [np.random.default_rng(epoch).permutation(50) for epoch in range(6)]
    straight = recorded(tmp_path / "a", random_logits, LABELS)
    mixed = recorded(tmp_path / "b", random_logits, LABELS, shuffled)
    for method in ("el2n", "aum", "forgetting"):
        values = [score(method, ScoreInputs(LABELS, 0, dynamics=dynamics)).values for dynamics in (straight, mixed)]
        assert np.array_equal(*values)
    assert score("el2n", ScoreInputs(LABELS, 0, dynamics=mixed)).values[3] == pytest.approx(
        residual_norms(random_logits[5, 3:4], LABELS[3:4])[0], rel=1e-3
    )


def test_memorization_without_a_standard_error(tmp_path, random_logits):
    for run in range(3):
        mask = np.arange(50) % 3 != run
        with DynamicsRecorder(tmp_path / "dyn", 50, LABELS, epochs=1, run=run, runs=3, mask=mask) as recorder:
            recorder.update(np.arange(50), random_logits[run])
            recorder.end_epoch()
    found = score("memorization", ScoreInputs(LABELS, 0, dynamics=Dynamics.open(tmp_path / "dyn")))
    assert (found.extras["stderr"] > 0).all()
    assert (found.extras["stderr"] <= 1).all()


def test_moderate_saved_ids_are_the_dropped_ones_or_both_tails():
    rng = np.random.default_rng(0)
    labels = np.zeros(101, np.int64)
    features = rng.normal(0, 1, (101, 6)).astype(np.float32)
    values = score("moderate", ScoreInputs(labels, 0, logits=np.zeros((101, 1), np.float32), features=features)).values
    kept = choose(values, labels, 0.3, rule="moderate")
    dropped = np.setdiff1d(np.arange(101), kept)
    median = np.median(values)
    assert np.abs(values[kept] - median).max() <= np.abs(values[dropped] - median).max()
    assert values[kept].min() > np.quantile(values, 0.3)
    assert values[kept].max() < np.quantile(values, 0.7)


def head_problem(n=160, seed=0):
    """Features of three overlapping classes, some labels wrong."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 3
    features = (rng.normal(0, 1, (n, 5)) + 1.5 * np.eye(3, 5)[labels]).astype(np.float32)
    wrong = rng.choice(n, n // 10, replace=False)
    labels[wrong] = (labels[wrong] + 1) % 3
    return features, labels, wrong


def test_influence_without_the_inverse_hessian_and_of_unknown_sign():
    """Against retraining without the sample: the change of the held-out loss, size and sign."""
    from kdfast.ops.softmax_head import head_newton
    from kdfast.prune.scores.influence import held_out

    l2 = 0.02
    features, labels, _ = head_problem()
    options = {"l2": l2, "holdout": 0.3}
    inputs = ScoreInputs(labels, 0, logits=np.zeros((160, 3), np.float32), features=features, options=options)
    found = score("influence", inputs).values
    first, second = held_out(labels, 0.3, 0)
    x = torch.from_numpy(features).double()
    y = torch.from_numpy(labels)

    def held_loss(trained, held):
        """A removed sample leaves the sum over the others divided by the same count: rescaled penalty."""
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


def test_influence_of_mislabelled_samples():
    features, labels, wrong = head_problem(n=600)
    clean = np.setdiff1d(np.arange(600), wrong)
    base = {"labels": labels, "seed": 0, "logits": np.zeros((600, 3), np.float32), "features": features}
    removal = score("influence", ScoreInputs(**base, options={"l2": 0.02})).values
    own = score("influence", ScoreInputs(**base, options={"l2": 0.02, "kind": "self"})).values
    assert removal[wrong].mean() < 0 < removal[clean].mean()
    assert np.median(own[wrong]) > np.quantile(own[clean], 0.8)


def test_influence_validated_on_the_test_split(tmp_path):
    """Its validation samples come from the training split alone: a test split that nobody may touch."""
    from kdfast.data.source import ArraySplit, Source, generic_views
    from kdfast.prune.scores.compute import open_inputs

    class Untouchable:
        shape = (8, 8, 3)
        labels = np.zeros(1, np.int64)

        def read(self, ids):
            raise AssertionError("the test split was read")

        def __len__(self):
            raise AssertionError("the test split was looked at")

    features, labels, _ = head_problem()
    split = ArraySplit(np.zeros((160, 8, 8, 3), np.uint8), labels, "images")
    source = Source("memory", "npz", ("a", "b", "c"), split, Untouchable(), generic_views((8, 8, 3), flip=False))
    opened, _ = open_inputs(source, seed=0, options={"l2": 0.02})
    inputs = dataclasses.replace(opened, logits=np.zeros((160, 3), np.float32), features=features)
    assert np.isfinite(score("influence", inputs).values).all()
