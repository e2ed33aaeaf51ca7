"""Draw with a Beta density over the ranks of the scores."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.pruning.options import Option
from kdfast.pruning.rules.base import FloatArray, RuleInputs
from kdfast.pruning.rules.draw import draw_weighted

OPTIONS = {
    "a": Option(1.0, "first parameter of the density; a > b prefers hard samples", low=1e-3, high=1e3),
    "b": Option(1.0, "second parameter of the density; a = b = 1 is uniform", low=1e-3, high=1e3),
}


def beta(inputs: RuleInputs) -> IntArray:
    """Draw without replacement, weighted by a Beta density over the ranks.

    u = (rank - 1/2) / n runs from the easiest to the hardest sample of the group, with equal scores sharing their mean
    rank. The weight is u^(a-1) (1-u)^(b-1): a = b = 1 is uniform, a > b prefers hard samples.
    """
    u = mid_ranks(inputs.scores)
    log_weights = (inputs.number("a") - 1) * np.log(u) + (inputs.number("b") - 1) * np.log1p(-u)
    return draw_weighted(inputs, log_weights)


def mid_ranks(scores: FloatArray) -> FloatArray:
    """Return ranks in (0, 1), float64 (n,): (rank - 1/2) / n, with equal scores sharing their mean rank."""
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2 - 0.5) / max(1, len(scores)))[group]
