"""The score `medium` is the teacher's cross-entropy, and its rule keeps the middle of every class."""

import math

import numpy as np
import pytest

from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.registry import SCORES, compute_score

N, C = 60, 4
LABELS = np.random.default_rng(2).permutation(np.arange(N) % C).astype(np.int64)


def medium(logits, labels):
    return compute_score("medium", ScoreInputs(labels, 0, logits=logits)).values


def test_is_the_cross_entropy_of_plain_loops():
    logits = np.random.default_rng(0).normal(0, 3, (N, C)).astype(np.float32)
    expected = []
    for row, y in zip(logits.tolist(), LABELS, strict=True):
        expected.append(-math.log(math.exp(row[y]) / math.fsum(math.exp(z) for z in row)))
    np.testing.assert_allclose(medium(logits, LABELS), expected, rtol=1e-12)


def test_keeps_its_precision_where_the_probability_of_the_label_rounds_to_one():
    logits = np.array([[50, 0, 0], [80, 0, 0], [0, 800, 800], [2000, 0, 1]], np.float32)
    found = medium(logits, np.array([0, 0, 0, 1]))
    np.testing.assert_allclose(found, [2 * math.exp(-50), 2 * math.exp(-80), 800 + math.log(2), 2000], rtol=1e-12)


def test_no_loss_where_the_other_classes_are_beyond_the_range_of_float64():
    assert medium(np.array([[2000, 0], [0, 1]], np.float32), np.array([0, 1])).tolist()[0] == 0


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.7])
def test_keeps_the_middle_of_each_class_as_the_public_code_does(fraction: float):
    """Classes of an even size: n/2 - ceil(k/2) ranks are dropped from the easy end, as in the public code."""
    rng = np.random.default_rng(1)
    labels = np.repeat(np.arange(3), 20)
    scores = medium(rng.normal(0, 3, (60, 3)).astype(np.float32), labels)
    kept = select_subset(scores, labels, fraction, rule=SCORES["medium"].rule).ids
    expected = []
    for label in range(3):
        members = np.flatnonzero(labels == label)
        count = round(20 * fraction)
        lower = count - count // 2
        expected += list(members[np.argsort(scores[members])][10 - lower : 10 + count // 2])
    assert kept.tolist() == sorted(expected)
