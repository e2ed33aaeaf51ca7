"""Numbers behind the score page: example samples, class balance, overlap and rank correlation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdfast.data.source import Split
from kdfast.data.stateless_random import IntArray
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.rules.beta import mid_ranks
from kdfast.report.images import encode_data_uri
from kdfast.teacher.cache import TeacherCache

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Example:
    """A training sample to show.

    Attributes:
        id: Index in the training split.
        score: Its score; None without scores.
        image: Its image as a data URI.
        predictions: The teacher's most probable classes with their probabilities, in descending order; empty without a
            cache.
    """

    id: int
    score: float | None
    image: str
    predictions: tuple[tuple[int, float], ...]


def classes_by_mean_score(scores: FloatArray, labels: IntArray, count: int) -> list[int]:
    """Select classes evenly from the ranking by mean score, highest first.

    Args:
        scores: float64 (N,).
        labels: int64 (N,).
        count: Maximum number of classes.
    """
    present = np.unique(labels)
    means = np.array([scores[labels == label].mean() for label in present])
    order = present[np.argsort(-means, kind="stable")]
    places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [int(label) for label in order[places]]


def extreme_samples(scores: FloatArray, labels: IntArray, label: int, count: int) -> tuple[IntArray, IntArray]:
    """Return a class's samples of highest and of lowest score, int64 (count,) each, the most extreme first."""
    members = np.flatnonzero(labels == label)
    order = members[np.argsort(-scores[members], kind="stable")]
    count = min(count, len(order))
    return order[:count], order[::-1][:count]


def load_examples(
    ids: IntArray, scores: FloatArray | None, split: Split, cache: TeacherCache | None, top: int = 3
) -> list[Example]:
    """Load images, scores and the teacher's predictions of samples.

    Args:
        ids: int64 (n,).
        scores: float64 (N,), of all samples, or None.
        split: The training split.
        cache: A teacher's cache, or None.
        top: Number of predictions per sample.
    """
    cached_rows: dict[int, int] = {}
    if cache is not None:
        wanted = set(ids.tolist())
        cached_rows = {i: row for row, i in enumerate(cache.coverage.tolist()) if i in wanted}
    examples = []
    for i, pixels in zip(ids.tolist(), split.read(ids), strict=True):
        row = cached_rows.get(i)
        predictions = () if cache is None or row is None else _top_predictions(cache.identity_logits()[row], top)
        score = None if scores is None else float(scores[i])
        examples.append(Example(i, score, encode_data_uri(pixels), predictions))
    return examples


def class_counts(labels: IntArray, ids: IntArray, classes: int) -> tuple[IntArray, IntArray]:
    """Count the samples of each class in the data and in the subset, int64 (classes,) each."""
    return (
        np.bincount(labels, minlength=classes).astype(np.int64),
        np.bincount(labels[ids], minlength=classes).astype(np.int64),
    )


def highest_samples(scores: FloatArray, fraction: float) -> IntArray:
    """Return the samples of highest score, regardless of class; int64, at least one."""
    return np.argsort(-scores, kind="stable")[: max(1, round(fraction * len(scores)))]


def rank_correlations(scores: Mapping[str, FloatArray]) -> Matrix:
    """Return Spearman's correlation of every pair of scores, float64 (m, m); NaN where one is constant."""
    ranks = [mid_ranks(values) for values in scores.values()]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(np.stack(ranks)))


def compute_overlaps(sets: Mapping[str, IntArray]) -> Matrix:
    """Return the share of the row's samples that the column also has, float64 (m, m)."""
    lists = list(sets.values())
    return np.array([[len(np.intersect1d(a, b)) / len(a) for b in lists] for a in lists])


def _top_predictions(logits: npt.NDArray[np.float32], top: int) -> tuple[tuple[int, float], ...]:
    p = np.exp(logits.astype(np.float64) - logits.max())
    p /= p.sum()
    return tuple((int(c), float(p[c])) for c in np.argsort(-p, kind="stable")[:top])
