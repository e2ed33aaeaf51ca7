"""The record of a search in idx.json."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.pruning.if_beta.learner import IFBetaResult
from kdfast.pruning.rules.base import FloatArray

_BINS = 40
_EXTREMES = 10


def summarize(result: IFBetaResult, labels: IntArray, samples: IntArray) -> dict[str, Any]:
    """Return the record of a search in idx.json, sufficient to draw its page without the data.

    Args:
        result: The search.
        labels: int64 (N,), of the samples that the search chose from.
        samples: int64 (N,), their indices into the training split.

    Returns:
        JSON values: the policy and its path, rewards, the gain over the uniform policy, the time of the search,
        histograms of the ranks and scores of all and of the kept samples, class counts, and the kept samples of highest
        and lowest score.
    """
    gain = result.gain
    return {
        "a": result.a,
        "b": result.b,
        "learned": list(result.learned),
        "path": result.path,
        "rewards": result.rewards,
        "accuracies": result.accuracies,
        "gain": {name: getattr(gain, name) for name in gain.__dataclass_fields__},
        "trials": result.trials,
        "held_out": result.held_out,
        "chosen_of": result.candidates,
        "search_seconds": result.search_seconds,
        "ranks": _histogram(result.u, result.ids, np.linspace(0, 1, _BINS + 1)),
        "scores": _histogram(result.scores, result.ids, _edges(result.scores)),
        "classes": {
            "all": np.bincount(labels).tolist(),
            "kept": np.bincount(labels[result.ids], minlength=int(labels.max()) + 1).tolist(),
        },
        "ends": _extremes(result, labels, samples),
    }


def _edges(scores: FloatArray) -> FloatArray:
    """Return edges of equal bins over the central 98% of the scores; `_histogram` adds outliers to the outer bins."""
    low, high = np.quantile(scores, [0.01, 0.99])
    if not low < high:
        low, high = scores.min(), scores.max()
    return np.linspace(low, high, _BINS + 1)


def _histogram(values: FloatArray, ids: IntArray, edges: FloatArray) -> dict[str, list[float]]:
    inside = np.clip(values, edges[0], edges[-1])
    count = {name: np.histogram(part, edges)[0].tolist() for name, part in (("all", inside), ("kept", inside[ids]))}
    return {"edges": edges.tolist(), **count}


def _extremes(result: IFBetaResult, labels: IntArray, samples: IntArray) -> dict[str, list[dict[str, float]]]:
    order = result.ids[np.lexsort((result.ids, result.scores[result.ids]))]

    def rows(ids: IntArray) -> list[dict[str, float]]:
        return [
            {
                "id": int(samples[i]),
                "label": int(labels[i]),
                "score": float(result.scores[i]),
                "u": float(result.u[i]),
            }
            for i in ids
        ]

    return {"lowest": rows(order[:_EXTREMES]), "highest": rows(order[::-1][:_EXTREMES])}
