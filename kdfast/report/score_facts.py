"""What the page about scores shows, as numbers: examples, class balance, overlap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdfast.data.source import Split
from kdfast.data.stateless_random import IntArray
from kdfast.prune.rules.base import FloatArray
from kdfast.prune.rules.rank import mid_ranks
from kdfast.report.pictures import data_uri
from kdfast.teacher.cache import TeacherCache

Table = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Example:
    """One training sample to look at.

    Attributes:
        id: Its index.
        score: Its score.
        picture: Its image as a data URI.
        predictions: The teacher's classes and their probabilities, the likeliest first; empty without a cache.
    """

    id: int
    score: float
    picture: str
    predictions: tuple[tuple[int, float], ...]


def telling_classes(scores: FloatArray, labels: IntArray, count: int) -> list[int]:
    """Classes from the highest to the lowest mean score, evenly spread over that order.

    Args:
        scores: float64 (N,).
        labels: int64 (N,).
        count: How many, at most.
    """
    present = np.unique(labels)
    means = np.array([scores[labels == label].mean() for label in present])
    order = present[np.argsort(-means, kind="stable")]
    places = np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int))
    return [int(label) for label in order[places]]


def extremes(scores: FloatArray, labels: IntArray, label: int, count: int) -> tuple[IntArray, IntArray]:
    """A class's samples of highest and of lowest score, int64 (count,) each, the most extreme first."""
    members = np.flatnonzero(labels == label)
    order = members[np.argsort(-scores[members], kind="stable")]
    count = min(count, len(order))
    return order[:count], order[::-1][:count]


def examples(
    ids: IntArray, scores: FloatArray, split: Split, cache: TeacherCache | None, top: int = 3
) -> list[Example]:
    """Pictures, scores and the teacher's predictions of some samples.

    Args:
        ids: int64 (n,).
        scores: float64 (N,) of all samples.
        split: Where the images are.
        cache: A teacher's cache, or None.
        top: How many predictions each.
    """
    covered: dict[int, int] = {}
    if cache is not None:
        wanted = set(ids.tolist())
        covered = {i: row for row, i in enumerate(cache.coverage.tolist()) if i in wanted}
    found = []
    for i, pixels in zip(ids.tolist(), split.read(ids), strict=True):
        row = covered.get(i)
        predictions = () if cache is None or row is None else _likeliest(cache.identity_logits()[row], top)
        found.append(Example(i, float(scores[i]), data_uri(pixels), predictions))
    return found


def class_shares(labels: IntArray, ids: IntArray, classes: int) -> tuple[IntArray, IntArray]:
    """Samples of each class in the data and in the subset, int64 (classes,) each."""
    return (
        np.bincount(labels, minlength=classes).astype(np.int64),
        np.bincount(labels[ids], minlength=classes).astype(np.int64),
    )


def hardest(scores: FloatArray, fraction: float) -> IntArray:
    """Samples of the highest scores, all classes together; int64, at least one."""
    return np.argsort(-scores, kind="stable")[: max(1, round(fraction * len(scores)))]


def rank_correlations(scores: Mapping[str, FloatArray]) -> Table:
    """Spearman's correlation of every two scores, float64 (m, m); NaN where one is constant."""
    ranks = [mid_ranks(values) for values in scores.values()]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.atleast_2d(np.corrcoef(np.stack(ranks)))


def shared(sets: Mapping[str, IntArray]) -> Table:
    """Share of the row's samples that the column has too, float64 (m, m)."""
    lists = list(sets.values())
    return np.array([[len(np.intersect1d(a, b)) / len(a) for b in lists] for a in lists])


def _likeliest(logits: npt.NDArray[np.float32], top: int) -> tuple[tuple[int, float], ...]:
    odds = np.exp(logits.astype(np.float64) - logits.max())
    odds /= odds.sum()
    return tuple((int(c), float(odds[c])) for c in np.argsort(-odds, kind="stable")[:top])
