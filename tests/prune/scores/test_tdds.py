"""TDDS matches plain loops over complete predictions, and what the k largest probabilities leave of them."""

import math

import numpy as np
import pytest
import torch

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import DataError, UsageError
from kdfast.pruning.scores import tdds as module
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import compute_score
from kdfast.pruning.scores.tdds import compute_changes

N, C, EPOCHS, RUNS = 30, 6, 13, 2
LABELS = np.arange(N) % C


@pytest.fixture(scope="module")
def logits():
    rng = np.random.default_rng(3)
    drift = np.linspace(0, 3, EPOCHS)[:, None, None] * np.eye(C)[LABELS]
    return (rng.normal(0, 1.5, (RUNS, EPOCHS, N, C)) + drift).astype(np.float32)


def record(path, logits, labels, top_k):
    runs, epochs, n, classes = logits.shape
    settings = {"epochs": epochs, "runs": runs, "top_k": top_k, "classes": classes}
    for run in range(runs):
        with DynamicsRecorder(path, n, labels, run=run, **settings) as recorder:
            for rows in logits[run]:
                recorder.update(np.arange(n), rows)
                recorder.end_epoch()
    return Dynamics.open(path)


@pytest.fixture(scope="module")
def dynamics(tmp_path_factory, logits):
    return record(tmp_path_factory.mktemp("dynamics") / "dyn", logits, LABELS, C)


def probabilities(logits):
    return torch.from_numpy(logits).double().softmax(-1).half().double().numpy()  # rounded as recorded


def score(dynamics, labels=LABELS, **options):
    return compute_score("tdds", ScoreInputs(labels, 0, dynamics=dynamics, options=options)).values


def change(before, after, absolute):
    terms = [q * (math.log(q + 1e-8) - math.log(p + 1e-8)) for p, q in zip(before, after, strict=True)]
    return sum(abs(t) for t in terms) if absolute else sum(terms)


def naive_tdds(predictions, window, first, decay, absolute):
    """The score of one sample from its predictions (E, C): one window after the other, then the weighted sum."""
    weighted = []
    for k in range(first - window + 1):
        part = predictions[k : k + window]
        changes = [change(part[j], part[j + 1], absolute) for j in range(window - 1)]
        mean = sum(changes) / (window - 1)
        norm = math.sqrt(sum((x - mean) ** 2 for x in changes))
        weighted.append(norm * decay * (1 - decay) ** (first - window - k))
    return sum(weighted)


@pytest.mark.parametrize(("fidelity", "window", "first", "decay"), [
    ("paper", 10, 30, 0.9),
    ("code", 10, 30, 0.9),
    ("code", 5, 10, 0.9),
    ("paper", 3, 8, 0.3),
    ("code", 13, 13, 1.0),
])  # fmt: skip
def test_follows_the_public_code_of_tdds(dynamics, logits, fidelity, window, first, decay):
    """The window's mean is subtracted from its changes; the last window has the weight `decay`."""
    p = probabilities(logits)
    used = min(first, EPOCHS)
    expected = [
        np.mean([naive_tdds(p[run, :, i], window, used, decay, fidelity == "code") for run in range(RUNS)])
        for i in range(N)
    ]
    found = score(dynamics, fidelity=fidelity, window=window, first=first, decay=decay)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=1e-6)


def test_three_samples(tmp_path):
    """Over four epochs, predictions of two classes stay, move once, or move at a steady rate; in one window.

    p = .5 throughout has no changes. From .5 to .9 in the second epoch only: the changes d, 0, 0 with d = KL(.9 || .5)
    = .3681 deviate by sqrt(d^2 - d^2 / 3). Alternating .2 and .8: three equal changes, no deviation.
    """
    p = np.array([[0.5, 0.5, 0.2], [0.5, 0.9, 0.8], [0.5, 0.9, 0.2], [0.5, 0.9, 0.8]])
    dynamics = record(tmp_path / "dyn", np.log(np.stack([p, 1 - p], axis=-1))[None], np.zeros(3, int), 2)
    d = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    found = score(dynamics, np.zeros(3, int), window=4, decay=1)
    np.testing.assert_allclose(found, [0, math.sqrt(d * d * 2 / 3), 0], atol=1e-3)


def top(p, k):
    ids = np.argsort(-p, axis=1)[:, :k]
    return ids.astype(np.uint8), np.take_along_axis(p, ids, axis=1)


def complete(row, other, k):
    """One sample's probabilities from its k largest ones and the k largest classes of the other epoch."""
    largest, near = (sorted(range(C), key=lambda c, p=p: -p[c])[:k] for p in (row, other))
    near = [c for c in near if c not in largest]
    smallest = row[largest[-1]]
    rest = min(max(1 - sum(row[c] for c in largest), 0), (C - k) * smallest)
    ranks = min(k, C - k)
    ratio = rest / (rest + smallest)
    next_k = [smallest * ratio ** (j + 1) for j in range(ranks)]
    far = C - k - len(near)
    of_near = sum(next_k) / ranks if far else rest / max(len(near), 1)
    of_far = (rest - len(near) * of_near) / max(far, 1)
    return [row[c] if c in largest else of_near if c in near else of_far for c in range(C)]


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_classes_of_the_other_epoch_are_among_the_next_k(logits, k, absolute, monkeypatch):
    monkeypatch.setattr(module, "_BLOCK_ELEMENTS", 7 * C)  # several blocks, the last one shorter
    before, after = probabilities(logits)[0, :2]
    pairs = [(complete(p, q, k), complete(q, p, k)) for p, q in zip(before, after, strict=True)]
    for pair in pairs:
        np.testing.assert_allclose(np.sum(pair, axis=1), 1, atol=1e-3)
    expected = [change(p, q, absolute) for p, q in pairs]
    found = compute_changes(*top(before, k), *top(after, k), C, absolute)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("k", [C - 1, C])
def test_predictions_are_exact_where_at_most_one_class_is_missing(logits, k, absolute):
    before, after = torch.from_numpy(logits[0, :2]).double().softmax(-1).numpy()  # without rounding
    expected = [change(p, q, absolute) for p, q in zip(before, after, strict=True)]
    found = compute_changes(*top(before, k), *top(after, k), C, absolute)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_a_certain_prediction_has_a_finite_change():
    ids, certain = np.array([[0, 1], [1, 0]], np.uint8), np.array([[1, 0], [1, 0]], np.float16)
    found = compute_changes(ids, certain, ids[::-1], certain, 9, False)
    np.testing.assert_allclose(found, math.log(1e8), rtol=1e-6)


def test_needs_predictions_and_a_window_of_epochs(dynamics, tmp_path, logits):
    with pytest.raises(UsageError, match="tdds needs 14 epochs for a window, but there are 13"):
        score(dynamics, window=14)
    without = record(tmp_path / "dyn", logits, LABELS, 0)
    with pytest.raises((DataError, UsageError), match="record"):
        score(without)
