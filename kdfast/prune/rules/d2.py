"""D2 pruning: scores flow along a graph of neighbours, then each sample that is kept lowers its neighbours."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.prune.rules.base import FloatArray, Option, OptionValue, RuleInputs, drop_hardest, need_features

OPTIONS = {
    "k": Option(5, "neighbours of a sample in the graph, before it is made undirected", low=1, high=1000, whole=True),
    "gamma": Option(1.0, "decay of the forward messages with distance", low=0, high=1e6),
    "gamma_r": Option(0.1, "decay of the reverse messages with distance", low=0, high=1e6),
    "cut": Option(
        None, "share of the hardest dropped first; by default 0 from f = .5 on, rising to .4 at f = .1", low=0, high=1
    ),
    "fidelity": Option(
        "code", "messages decay as exp(-gamma d) (code) or exp(-gamma d^2) (paper)", choices=("paper", "code")
    ),
}


def default_cut(fraction: float) -> float:
    """The share of the hardest samples that is dropped when `fraction` of all is kept: .4 at .1, 0 from .5 on."""
    return float(np.interp(fraction, (0.1, 0.5), (0.4, 0.0)))


def settle(inputs: RuleInputs) -> dict[str, OptionValue]:
    """The default cut at this fraction."""
    return {"cut": default_cut(inputs.fraction)}


def d2(inputs: RuleInputs) -> IntArray:
    """Drop the hardest `cut` share of the group, then select on the graph of the rest.

    Scores below zero are shifted so that the lowest is 0: messages add up importance, and none is negative.
    The time is that of the neighbours: N^2 D multiplications, where N is the group's size. With class budgets the graph
    is that of one class.

    Source:
        Maharana et al. 2023, D2 pruning: message passing for balancing diversity and difficulty in data pruning. The
        paper's messages decay with the squared distance, the public code's with the distance.
    """
    from kdfast.prune.rules.d2_graph import nearest
    from kdfast.prune.rules.d2_greedy import select

    if not inputs.count:
        return np.zeros(0, np.int64)
    left = drop_hardest(inputs, inputs.number("cut"))
    neighbours, distances = nearest(need_features(inputs)[left], int(inputs.number("k")), device=inputs.device)
    starts, ends, lengths = undirected(neighbours, distances)
    if inputs.options["fidelity"] == "paper":
        lengths = np.square(lengths)
    scores = inputs.scores[left] - min(0.0, float(inputs.scores[left].min()))
    reached = forward(scores, starts, ends, np.exp(-inputs.number("gamma") * lengths))
    ranks = np.argsort(np.argsort(inputs.ties[left]))
    return left[select(reached, starts, ends, np.exp(-inputs.number("gamma_r") * lengths), ranks, inputs.count)]


def undirected(neighbours: IntArray, distances: FloatArray) -> tuple[IntArray, IntArray, FloatArray]:
    """The graph in which two samples are joined when either is a neighbour of the other, in compressed rows.

    Args:
        neighbours: int64 (N, k).
        distances: float64 (N, k).

    Returns:
        Where each sample's edges start, int64 (N + 1,); the samples they lead to, int64 (E,), ascending for each
        sample; and their lengths, float64 (E,).
    """
    n, k = neighbours.shape
    here = np.repeat(np.arange(n, dtype=np.int64), k)
    there = neighbours.ravel()
    low, high = np.minimum(here, there), np.maximum(here, there)
    edges, first = np.unique(low * n + high, return_index=True)
    low, high, lengths = edges // n, edges % n, distances.ravel()[first]
    source, target = np.concatenate((low, high)), np.concatenate((high, low))
    order = np.lexsort((target, source))
    starts = np.searchsorted(source[order], np.arange(n + 1))
    return starts, target[order], np.concatenate((lengths, lengths))[order]


def forward(scores: FloatArray, starts: IntArray, ends: IntArray, weights: FloatArray) -> FloatArray:
    """u_i = s_i + sum over the neighbours j of w_ij s_j, float64 (N,)."""
    source = np.repeat(np.arange(len(scores)), np.diff(starts))
    return scores + np.bincount(source, weights * scores[ends], minlength=len(scores))
