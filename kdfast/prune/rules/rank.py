"""Rules that look at nothing but the order of the scores, and the Beta draw over their ranks."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray, Purpose, hash64, unit
from kdfast.prune.rules.base import FloatArray, RuleInputs, by_rank, uniform


def hard(inputs: RuleInputs) -> IntArray:
    """Keep the highest scores."""
    return by_rank(inputs.scores, inputs.ties)[: inputs.count]


def easy(inputs: RuleInputs) -> IntArray:
    """Keep the lowest scores."""
    return by_rank(-inputs.scores, inputs.ties)[: inputs.count]


def moderate(inputs: RuleInputs) -> IntArray:
    """Keep the middle of the ranking; an odd number of samples to drop loses one more at the hard end.

    Source:
        Xia et al. 2023, Moderate coreset: those whose distance to the class centre is nearest the median by rank.
    """
    start = (len(inputs.scores) - inputs.count) // 2
    return by_rank(-inputs.scores, inputs.ties)[start : start + inputs.count]


def random(inputs: RuleInputs) -> IntArray:
    """Keep samples at random, whatever their scores: the subsets of the score `random` under the rule `hard`."""
    draw = unit(hash64(Purpose.SCORE, inputs.seed, inputs.ids))
    return by_rank(draw, inputs.ties)[: inputs.count]


def beta(inputs: RuleInputs) -> IntArray:
    """Draw without replacement, with weights that are a Beta density over the ranks.

    u = (average-tie rank - 1/2) / n runs from the easiest to the hardest sample of the group, and the weight is
    u^(a-1) (1-u)^(b-1): a = b = 1 is uniform, a > b prefers hard samples.
    """
    u = mid_ranks(inputs.scores)
    log_weights = (inputs.number("a") - 1) * np.log(u) + (inputs.number("b") - 1) * np.log1p(-u)
    return weighted_draw(inputs, log_weights)


def mid_ranks(scores: FloatArray) -> FloatArray:
    """Ranks in (0, 1), float64 (n,): (rank - 1/2) / n, equal scores sharing the average of their ranks."""
    _, group, counts = np.unique(scores, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return ((last - (counts - 1) / 2 - 0.5) / max(1, len(scores)))[group]


def weighted_draw(inputs: RuleInputs, log_weights: FloatArray) -> IntArray:
    """Draw `count` samples without replacement, each next one in proportion to the weights that are left.

    The highest `log_weights + Gumbel noise` are such a draw (Plackett-Luce). The noise is a hash of the seed and the
    sample's index, so it is the same whatever the group. Weights of zero are drawn last.

    Args:
        inputs: The group.
        log_weights: float64 (n,), up to a constant; -inf for a weight of zero.

    Source:
        Kool, van Hoof and Welling 2019, Stochastic beams and where to find them, section 2.
    """
    gumbel = -np.log(-np.log(uniform(inputs.seed, inputs.ids)))
    return by_rank(log_weights + gumbel, inputs.ties)[: inputs.count]
