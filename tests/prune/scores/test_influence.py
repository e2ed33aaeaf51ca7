"""Influence of the head: the distillation loss against dense algebra, and the held-out part of uneven classes."""

import numpy as np
import pytest
import torch

from kdfast.errors import DataError, UsageError
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.influence import draw_holdout
from kdfast.pruning.scores.registry import compute_score

N, C, D, L2 = 36, 3, 2, 0.05


@pytest.fixture(scope="module")
def problem():
    """Return features (N, D), teacher logits (N, C), which are no function of the features, and labels."""
    rng = np.random.default_rng(4)
    labels = np.arange(N, dtype=np.int64) % C
    features = (rng.normal(0, 1, (N, D)) + np.eye(C, D)[labels]).astype(np.float32)
    return features, rng.normal(0, 2, (N, C)).astype(np.float32), labels


def score(problem, **options):
    features, logits, labels = problem
    inputs = ScoreInputs(labels, 0, logits=logits, features=features, options={"l2": L2, **options})
    return compute_score("influence", inputs).values


def loss(z, y, t, alpha, temperature):
    """Return (1 - alpha) CE + alpha T^2 KL(teacher || head) of each row, written out."""
    own = -z.log_softmax(1)[torch.arange(len(z)), y]
    q = (t / temperature).softmax(1)
    divergence = (q * (q.log() - (z / temperature).log_softmax(1))).sum(1)
    return (1 - alpha) * own + alpha * temperature**2 * divergence


class Dense:
    """The optimal head and its Hessian by Newton steps with autograd's dense Hessian, on some rows."""

    def __init__(self, problem, rows, alpha, temperature):
        features, logits, labels = problem
        self.x = torch.cat([torch.from_numpy(features).double(), torch.ones(N, 1, dtype=torch.float64)], 1)
        self.t, self.y = torch.from_numpy(logits).double(), torch.from_numpy(labels)
        self.kd, rows = (alpha, temperature), torch.from_numpy(rows)

        def objective(w):
            return self.losses(w, rows).mean() + L2 / 2 * w.square().sum()

        self.w = torch.zeros(C * (D + 1), dtype=torch.float64)
        for _ in range(30):
            gradient = torch.autograd.functional.jacobian(objective, self.w)
            self.hessian = torch.autograd.functional.hessian(objective, self.w)
            self.w = self.w - torch.linalg.solve(self.hessian, gradient)
        assert gradient.norm() < 1e-10

    def losses(self, w, rows, kd=None):
        z = self.x[rows] @ w.view(C, D + 1).T
        return loss(z, self.y[rows], self.t[rows], *(kd or self.kd))

    def gradients(self, rows, kd=None):
        rows = torch.from_numpy(np.asarray(rows))
        return torch.autograd.functional.jacobian(lambda w: self.losses(w, rows, kd), self.w)


@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 4.0), (0.9, 2.0), (1.0, 1.0)])
def test_influence_on_the_distillation_loss(problem, alpha, temperature):
    options = {"alpha": alpha, "temperature": temperature}
    everything = np.arange(N)
    dense = Dense(problem, everything, alpha, temperature)
    g = dense.gradients(everything)
    expected = (g * torch.linalg.solve(dense.hessian, g.T).T).sum(1) / N
    np.testing.assert_allclose(score(problem, kind="self", **options), expected, rtol=1e-6)

    total, count = np.zeros(N), np.zeros(N)
    for half in draw_holdout(problem[2], 0.3, 0):
        trained = np.setdiff1d(everything, half)
        dense = Dense(problem, trained, alpha, temperature)
        held = dense.gradients(half, (0.0, 1.0)).mean(0)  # the validation loss is the cross-entropy
        total[trained] += (dense.gradients(trained) @ torch.linalg.solve(dense.hessian, held)).numpy() / len(trained)
        count[trained] += 1
    np.testing.assert_allclose(score(problem, holdout=0.3, **options), total / count, rtol=1e-4, atol=1e-8)


def test_alpha_zero_is_the_plain_influence(problem):
    for kind in ("self", "removal", "absolute"):
        plain = score(problem, kind=kind)
        assert np.array_equal(plain, score(problem, kind=kind, alpha=0, temperature=4))


def test_without_labels_the_teachers_own_head_has_no_gradient(problem):
    with pytest.raises(DataError, match="alpha = 1 the teacher's logits equal the head's own"):
        score(problem, kind="self", alpha=1, polish="no")
    with pytest.raises(UsageError, match=r"alpha=1\.5: must be a number from 0 to 1"):
        score(problem, alpha=1.5)


SIZES = [1, 2, 3, 4, 5, 6, 40]


def uneven(sizes):
    return np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes)).astype(np.int64)


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_halves_of_uneven_classes(share, seed):
    labels = uneven(SIZES)
    halves = draw_holdout(labels, share, seed)
    wanted = max(1, round(share * len(labels) / len(SIZES) / 2))
    for half in halves:
        assert np.array_equal(half, np.unique(half))
        counts = np.bincount(labels[half], minlength=len(SIZES))
        assert counts.tolist() == [min(wanted, most) for most in (0, 1, 1, 1, 2, 2, 19)]
        left = np.bincount(np.delete(labels, half), minlength=len(SIZES))
        assert left.min() >= 1, "every class is trained on while the other half validates"
    assert not set(halves[0]) & set(halves[1])
    outside = np.bincount(np.delete(labels, np.concatenate(halves)), minlength=len(SIZES))
    assert outside.tolist()[1] == 0
    assert np.delete(outside, 1).min() >= 1


@pytest.mark.parametrize("kind", ["removal", "absolute", "self"])
@pytest.mark.parametrize("sizes", [SIZES, [2, 1], [1, 30], [2, 2, 2], [1, 1, 3]])
def test_small_classes_have_finite_scores(kind, sizes):
    labels = uneven(sizes)
    if kind != "self" and max(sizes) < 2:
        pytest.skip("nothing to hold out")
    rng = np.random.default_rng(1)
    features, logits = (rng.normal(0, 1, (len(labels), width)).astype(np.float32) for width in (3, len(sizes)))
    inputs = ScoreInputs(labels, 0, logits=logits, features=features, options={"kind": kind})
    values = compute_score("influence", inputs).values
    assert np.isfinite(values).all()
    assert (values != 0).all()


def test_a_class_of_one_sample_is_not_validated_and_harms_the_others():
    """Features orthogonal to the others': removing the only sample of its class frees probability for the others."""
    labels = np.array([0] * 10 + [1] * 10 + [2])
    features = np.zeros((21, 3), np.float32)
    features[np.arange(21), labels] = 1
    found = score((features, np.zeros((21, 3), np.float32), labels))
    assert found[20] < 0
    assert (found[:20] > 0).all()


def test_classes_of_one_sample_each_are_refused():
    labels = np.arange(5, dtype=np.int64)
    values = np.eye(5, dtype=np.float32)
    with pytest.raises(DataError, match=r"single training sample.*kind=self"):
        score((values, values, labels))
    assert np.isfinite(score((values, values, labels), kind="self")).all()


def test_the_temperature_needs_alpha(problem):
    with pytest.raises(UsageError, match=r"temperature=2\.0 of influence has an effect only with alpha above 0"):
        score(problem, temperature=2.0)
    assert not np.array_equal(score(problem, temperature=2.0, alpha=0.5), score(problem, alpha=0.5))
