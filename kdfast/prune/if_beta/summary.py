"""What a subset looks like, as JSON values: enough to draw its report without the data."""

from __future__ import annotations

from typing import Any

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.prune.if_beta.learner import IFBetaResult
from kdfast.prune.if_beta.policy import FloatArray

_BINS = 40
_ENDS = 10


def summarize(result: IFBetaResult, labels: IntArray) -> dict[str, Any]:
    """Everything about a search that idx.json keeps.

    Args:
        result: The search.
        labels: int64 (N,).

    Returns:
        JSON values: the policy, its path, rewards, the gain over the uniform policy on the proxy, seconds, histograms
        of ranks and scores of all samples and of those kept, class counts, and the highest and lowest samples kept.
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
        "chosen_of": result.chosen_of,
        "score_seconds": result.score_seconds,
        "search_seconds": result.search_seconds,
        "ranks": _histogram(result.u, result.ids, np.linspace(0, 1, _BINS + 1)),
        "scores": _histogram(result.scores, result.ids, _edges(result.scores)),
        "classes": {
            "all": np.bincount(labels).tolist(),
            "kept": np.bincount(labels[result.ids], minlength=int(labels.max()) + 1).tolist(),
        },
        "ends": _ends(result, labels),
    }


def _edges(scores: FloatArray) -> FloatArray:
    """Bins of equal width over the central 98%; the outermost take the rest."""
    low, high = np.quantile(scores, [0.01, 0.99])
    if not low < high:
        low, high = scores.min(), scores.max()
    return np.linspace(low, high, _BINS + 1)


def _histogram(values: FloatArray, ids: IntArray, edges: FloatArray) -> dict[str, list[float]]:
    inside = np.clip(values, edges[0], edges[-1])
    count = {name: np.histogram(part, edges)[0].tolist() for name, part in (("all", inside), ("kept", inside[ids]))}
    return {"edges": edges.tolist(), **count}


def _ends(result: IFBetaResult, labels: IntArray) -> dict[str, list[dict[str, float]]]:
    order = result.ids[np.lexsort((result.ids, result.scores[result.ids]))]

    def rows(ids: IntArray) -> list[dict[str, float]]:
        return [
            {"id": int(i), "label": int(labels[i]), "score": float(result.scores[i]), "u": float(result.u[i])}
            for i in ids
        ]

    return {"lowest": rows(order[:_ENDS]), "highest": rows(order[::-1][:_ENDS])}
