"""Small data for the policy: Gaussian classes with a teacher's features and logits, made in milliseconds."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest
import torch

from kdfast.data.holdout import hold_out


class Cloud(NamedTuple):
    logits: torch.Tensor
    features: torch.Tensor
    labels: np.ndarray
    scores: np.ndarray


def make_cloud(n=1200, classes=3, dim=12, seed=0):
    """Overlapping classes, the logits of their Bayes classifier, and an uninformative score."""
    rng = np.random.default_rng(seed)
    labels = np.arange(n, dtype=np.int64) % classes
    means = rng.normal(size=(classes, dim))
    features = means[labels] + 1.5 * rng.normal(size=(n, dim))
    logits = (features @ means.T - (means**2).sum(1) / 2) / 1.5**2
    return Cloud(torch.tensor(logits).float(), torch.tensor(features).float(), labels, rng.random(n))


@pytest.fixture(scope="session")
def cloud():
    return make_cloud()


@pytest.fixture(scope="session")
def noisy_top(cloud):
    """Negate the teacher's logits in the highest fifth of each class's ranks, except on the held-out set of seed 0."""
    logits, clean = cloud.logits.clone(), hold_out(cloud.labels, 3, seed=0)[1]
    for c in range(3):
        members = np.flatnonzero(cloud.labels == c)
        top = members[np.argsort(cloud.scores[members])[-len(members) // 5 :]]
        logits[top] *= -1
    logits[clean] = cloud.logits[clean]
    return Cloud(logits, cloud.features, cloud.labels, cloud.scores)


@pytest.fixture(scope="session")
def two_halves():
    """Reverse the teacher's rule between low and high ranks: only half of each, the uniform policy, is best."""
    rng = np.random.default_rng(2)
    n, dim = 1600, 8
    labels = np.arange(n, dtype=np.int64) % 2
    features = rng.normal(size=(n, dim))
    scores = rng.random(n)
    side = 6 * (scores - 0.5)
    logits = np.stack([side, -side], 1) + 0.3 * rng.normal(size=(n, 2))
    return Cloud(torch.tensor(logits).float(), torch.tensor(features).float(), labels, scores)


@pytest.fixture(scope="session")
def noisy_fifth():
    """The highest fifth of each class's ranks looks like another class and has negated logits, but the held-out set."""
    rng = np.random.default_rng(0)
    n, classes, dim = 10_000, 5, 32
    labels, scores = np.arange(n, dtype=np.int64) % classes, rng.random(n)
    means = rng.normal(size=(classes, dim))
    noise = 1.5 * rng.normal(size=(n, dim))
    hard = np.zeros(n, bool)
    for c in range(classes):
        members = np.flatnonzero(labels == c)
        hard[members[np.argsort(scores[members])[-len(members) // 5 :]]] = True
    hard[hold_out(labels, classes, seed=0)[1]] = False
    features = means[(labels + hard) % classes] + noise
    logits = ((means[labels] + noise) @ means.T - (means**2).sum(1) / 2) / 1.5**2
    logits[hard] *= -1
    return Cloud(torch.tensor(logits).float(), torch.tensor(features).float(), labels, scores)


@pytest.fixture(scope="session")
def two_modes():
    """Classes with two centers each, one for low and one for high ranks: samples of both are needed."""
    rng = np.random.default_rng(1)
    n, classes, dim = 10_000, 5, 32
    labels, scores = np.arange(n, dtype=np.int64) % classes, rng.random(n)
    means = rng.normal(size=(2, classes, dim))
    features = means[(scores > 0.5).astype(int), labels] + rng.normal(size=(n, dim))
    log_p = [-((features[:, None] - center) ** 2).sum(2) / 2 for center in means]
    logits = np.logaddexp(*log_p)
    logits -= logits.max(1, keepdims=True)
    return Cloud(torch.tensor(logits).float(), torch.tensor(features).float(), labels, scores)
