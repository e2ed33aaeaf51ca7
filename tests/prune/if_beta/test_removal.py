"""The scores removal and absolute predict what removing a sample does, whatever head the teacher has."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import kdfast
from kdfast.data.holdout import hold_out
from kdfast.pruning.if_beta.scores import HeadInputs, absolute, removal
from kdfast.pruning.scores.influence import DEFAULT_L2

N, CLASSES, REMOVED = 300, 10, 25


@pytest.fixture(scope="module")
def head():
    """Digits as features, with the logits of a head that SGD trained without reaching the optimum."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images[:N]).float() / 16, torch.from_numpy(labels[:N]).long()
    torch.manual_seed(0)
    net = torch.nn.Linear(64, CLASSES)
    optimizer = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return HeadInputs(net(x).detach(), x, y, hold_out(y.numpy(), CLASSES, least=5)[1])


@pytest.fixture(scope="module")
def truth(head):
    """Change of the held-out loss when the head is fitted again without each of the first samples."""
    x, y, held = head.features.double(), head.labels, head.held_out
    start = kdfast.head_newton(x, y, l2=DEFAULT_L2)

    def loss(weights: torch.Tensor) -> float:
        return float(cross_entropy(kdfast.head_logits(x[held], weights), y[held]))

    effects = []
    for i in range(REMOVED):
        keep = torch.arange(N) != i
        # The penalty keeps its weight relative to each sample's loss.
        fitted = kdfast.head_newton(x[keep], y[keep], l2=DEFAULT_L2 * N / (N - 1), init=start)
        effects.append(loss(fitted) - loss(start))
    return np.array(effects)


def test_signs_of_removals_are_right(head, truth) -> None:
    found = removal(head)[:REMOVED]
    assert (np.sign(found) == np.sign(truth)).all()
    assert np.corrcoef(found, truth)[0, 1] > 0.99
    np.testing.assert_allclose(absolute(head), np.abs(removal(head)))


def test_the_teachers_own_head_misses_signs(head, truth) -> None:
    """What the scores did before they fitted a head: the reason that they do."""
    rows, x, y, z = torch.from_numpy(head.held_out), head.features, head.labels, head.logits
    found = kdfast.head_influence(x, z, y, x[rows], z[rows], y[rows], l2=DEFAULT_L2)[:REMOVED]
    assert (np.sign(found.numpy()) == np.sign(truth)).mean() < 0.9


def test_scores_of_removal_do_not_depend_on_the_teachers_logits(head) -> None:
    other = HeadInputs(torch.zeros_like(head.logits), head.features, head.labels, head.held_out)
    np.testing.assert_array_equal(removal(other), removal(head))
