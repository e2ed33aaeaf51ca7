"""Rules that use only the order of the scores."""

from __future__ import annotations

from kdfast.data.stateless_random import IntArray, Purpose, hash64, uniform
from kdfast.pruning.rules.base import RuleInputs, by_rank


def select_hardest(inputs: RuleInputs) -> IntArray:
    """Keep the highest scores."""
    return by_rank(inputs.scores, inputs.ties)[: inputs.count]


def select_easiest(inputs: RuleInputs) -> IntArray:
    """Keep the lowest scores."""
    return by_rank(-inputs.scores, inputs.ties)[: inputs.count]


def select_moderate(inputs: RuleInputs) -> IntArray:
    """Keep the middle of the ranking; if an odd number is dropped, the hard end loses one more.

    Source:
        Xia et al. 2023, Moderate coreset: keep the samples whose distance to the class center is nearest the median, by
        rank.
    """
    start = (len(inputs.scores) - inputs.count) // 2
    return by_rank(-inputs.scores, inputs.ties)[start : start + inputs.count]


def select_random(inputs: RuleInputs) -> IntArray:
    """Keep random samples and ignore the scores: the same subsets as the score `random` with the rule `hard`."""
    draws = uniform(hash64(Purpose.SCORE, inputs.seed, inputs.ids))
    return by_rank(draws, inputs.ties)[: inputs.count]
