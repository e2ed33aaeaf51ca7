"""D2 pruning: scores spread along a graph of neighbors, then each kept sample lowers its neighbors' scores."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.pruning.options import Option, OptionValue
from kdfast.pruning.rules.base import FloatArray, RuleInputs, by_rank, drop_hardest, require_features

AUM = "aum"
OPTIONS = {
    "k": Option(5, "neighbors per sample, before the graph is made undirected", low=1, high=1000, integer=True),
    "gamma": Option(1.0, "decay of the forward messages with distance", low=0, high=1e6),
    "gamma_r": Option(0.1, "decay of the reverse messages with distance", low=0, high=1e6),
    "cut": Option(
        None,
        "share of the hardest samples to drop first; automatic: 0 from f = .5 on, rising to .4 at f = .1",
        low=0,
        high=1,
    ),
    "cut_by": Option(
        "score",
        "what the hardest samples are dropped by: the score, within each class (score), or the area under the margin, "
        "among all samples (aum, public code)",
        choices=("score", AUM),
    ),
    "fidelity": Option(
        "code",
        "messages: scores of at least 1e-7, times exp(-gamma d) (public code), or any, times exp(-gamma d^2) (paper)",
        choices=("paper", "code"),
    ),
}
# Importance that the public code gives a sample of score 0 in messages, so that its edges do not vanish.
_FLOOR = 1e-7


def default_cut(fraction: float) -> float:
    """Return the share of the hardest samples to drop when `fraction` of all is kept: .4 at .1, 0 from .5 on."""
    return float(np.interp(fraction, (0.1, 0.5), (0.4, 0.0)))


def resolve_defaults(inputs: RuleInputs) -> dict[str, OptionValue]:
    """Return the default cut at this fraction."""
    return {"cut": default_cut(inputs.fraction)}


def cut_pool(inputs: RuleInputs) -> IntArray:
    """Return the positions that remain after the cut by the area under the margin, or all of them.

    The extra `aum` is minus the area under the margin: the highest are dropped. A class that this would empty keeps its
    easiest sample.
    """
    if inputs.options["cut_by"] != AUM:
        return np.arange(len(inputs.scores), dtype=np.int64)
    order = by_rank(inputs.extras[AUM], inputs.ties)
    dropped = min(round(inputs.number("cut") * len(order)), len(order) - inputs.count)
    remains = np.zeros(len(order), np.bool_)
    remains[order[dropped:]] = True
    if inputs.budgets is not None and inputs.labels is not None:
        _, first = np.unique(inputs.labels[order[::-1]], return_index=True)
        remains[order[::-1][first]] = True
    return np.flatnonzero(remains)


def d2(inputs: RuleInputs) -> IntArray:
    """Drop the hardest `cut` share of the group, then select on the graph of the remaining samples.

    Negative scores are shifted so that the lowest is 0, since messages add up importance. Finding the neighbors takes
    most of the time: N^2 D multiplications for a group of size N. With class budgets there is one graph per class.

    The public pipeline for CIFAR-10 is the score forgetting with never_learned=zero, margin=probability, cut_by=aum,
    and the same budget for each class.

    Source:
        Maharana et al. 2023, D2 pruning: message passing for balancing diversity and difficulty in data pruning. The
        paper's messages decay with the squared distance; the public code's decay with the distance, and a score below
        1e-7 counts as 1e-7 in them.
    """
    # Imported here: numba takes a second to import.
    from kdfast.pruning.rules.d2_graph import nearest_neighbors, undirected_graph
    from kdfast.pruning.rules.d2_greedy import select_greedily

    if not inputs.count:
        return np.zeros(0, np.int64)
    remaining = drop_hardest(inputs, inputs.number("cut") if inputs.options["cut_by"] == "score" else 0.0)
    neighbors, distances = nearest_neighbors(
        require_features(inputs)[remaining], int(inputs.number("k")), device=inputs.device
    )
    starts, ends, lengths = undirected_graph(neighbors, distances)
    paper = inputs.options["fidelity"] == "paper"
    if paper:
        lengths = np.square(lengths)
    scores = inputs.scores[remaining] - min(0.0, float(inputs.scores[remaining].min()))
    weights = np.exp(-inputs.number("gamma") * lengths)
    importance = pass_messages(scores, starts, ends, weights, floor=0.0 if paper else _FLOOR)
    reverse_weights = np.exp(-inputs.number("gamma_r") * lengths)
    ranks = np.argsort(np.argsort(inputs.ties[remaining]))
    return remaining[select_greedily(importance, starts, ends, reverse_weights, ranks, inputs.count)]


def pass_messages(
    scores: FloatArray, starts: IntArray, ends: IntArray, weights: FloatArray, floor: float = 0.0
) -> FloatArray:
    """Return u_i = s_i + sum over the neighbors j of w_ij max(s_j, floor), float64 (N,)."""
    source = np.repeat(np.arange(len(scores)), np.diff(starts))
    sent = np.maximum(scores, floor)
    return scores + np.bincount(source, weights * sent[ends], minlength=len(scores))
