"""D2 pruning: scores spread along a graph of neighbors, then each kept sample lowers its neighbors' scores."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.prune.options import Option, OptionValue
from kdfast.prune.rules.base import FloatArray, RuleInputs, drop_hardest, require_features

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
    "fidelity": Option(
        "code", "decay of messages: exp(-gamma d) (public code) or exp(-gamma d^2) (paper)", choices=("paper", "code")
    ),
}


def default_cut(fraction: float) -> float:
    """Return the share of the hardest samples to drop when `fraction` of all is kept: .4 at .1, 0 from .5 on."""
    return float(np.interp(fraction, (0.1, 0.5), (0.4, 0.0)))


def resolve_defaults(inputs: RuleInputs) -> dict[str, OptionValue]:
    """Return the default cut at this fraction."""
    return {"cut": default_cut(inputs.fraction)}


def d2(inputs: RuleInputs) -> IntArray:
    """Drop the hardest `cut` share of the group, then select on the graph of the remaining samples.

    Negative scores are shifted so that the lowest is 0, since messages add up importance. Finding the neighbors takes
    most of the time: N^2 D multiplications for a group of size N. With class budgets there is one graph per class.

    Source:
        Maharana et al. 2023, D2 pruning: message passing for balancing diversity and difficulty in data pruning. The
        paper's messages decay with the squared distance, the public code's with the distance.
    """
    # Imported here: numba takes a second to import.
    from kdfast.prune.rules.d2_graph import nearest_neighbors, undirected_graph
    from kdfast.prune.rules.d2_greedy import select_greedily

    if not inputs.count:
        return np.zeros(0, np.int64)
    remaining = drop_hardest(inputs, inputs.number("cut"))
    features = require_features(inputs)[remaining]
    neighbors, distances = nearest_neighbors(features, int(inputs.number("k")), device=inputs.device)
    starts, ends, lengths = undirected_graph(neighbors, distances)
    if inputs.options["fidelity"] == "paper":
        lengths = np.square(lengths)
    scores = inputs.scores[remaining] - min(0.0, float(inputs.scores[remaining].min()))
    importance = pass_messages(scores, starts, ends, np.exp(-inputs.number("gamma") * lengths))
    reverse_weights = np.exp(-inputs.number("gamma_r") * lengths)
    ranks = np.argsort(np.argsort(inputs.ties[remaining]))
    return remaining[select_greedily(importance, starts, ends, reverse_weights, ranks, inputs.count)]


def pass_messages(scores: FloatArray, starts: IntArray, ends: IntArray, weights: FloatArray) -> FloatArray:
    """Return u_i = s_i + sum over the neighbors j of w_ij s_j, float64 (N,)."""
    source = np.repeat(np.arange(len(scores)), np.diff(starts))
    return scores + np.bincount(source, weights * scores[ends], minlength=len(scores))
