"""Coverage-centric selection: drop the very hardest, then the same number from every stratum of the score."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.prune.rules.base import Option, OptionValue, RuleInputs, drop_hardest, uniform

OPTIONS = {
    "strata": Option(50, "strata of equal width", low=1, high=1_000_000, whole=True),
    "cut": Option(
        None, "share of the hardest dropped first; by default 0 from f = .5 on, rising to .3 at f = .1", low=0, high=1
    ),
}
# The share that is dropped on CIFAR-10 at each kept fraction, from the paper's table; between them, straight lines.
_FRACTIONS = (0.1, 0.2, 0.3, 0.5)
_CUTS = (0.3, 0.1, 0.1, 0.0)


def default_cut(fraction: float) -> float:
    """The share of the hardest samples that is dropped when `fraction` of all is kept."""
    return float(np.interp(fraction, _FRACTIONS, _CUTS))


def settle(inputs: RuleInputs) -> dict[str, OptionValue]:
    """The default cut at this fraction."""
    return {"cut": default_cut(inputs.fraction)}


def strata(inputs: RuleInputs) -> IntArray:
    """Keep the same number of every stratum of the score, at random within it.

    The hardest `cut` share of the group goes first (never so many that too few remain). Strata have equal width from
    the lowest to the highest score that is left. What a small stratum cannot give, the larger ones give in equal parts.

    Source:
        Zheng et al. 2023, Coverage-centric coreset selection for high pruning rates, Algorithm 1. The public code
        balances classes by the size of the last class; here each class is a group with its own budget.
    """
    left = drop_hardest(inputs, inputs.number("cut"))
    scores = inputs.scores[left]
    number = int(inputs.number("strata"))
    stratum = np.zeros(len(left), np.int64)
    if len(left) and scores.max() > scores.min():
        place = (scores - scores.min()) / (scores.max() - scores.min())
        stratum = np.minimum((place * number).astype(np.int64), number - 1)
    budgets = stratum_budgets(np.bincount(stratum, minlength=number), inputs.count)
    order = np.lexsort((uniform(inputs.seed, inputs.ids[left]), stratum))
    starts = np.searchsorted(stratum[order], np.arange(number))
    place_in_stratum = np.arange(len(left)) - starts[stratum[order]]
    return left[order[place_in_stratum < budgets[stratum[order]]]]


def stratum_budgets(sizes: IntArray, total: int) -> IntArray:
    """How many to take of each stratum: equal parts, and where a stratum is too small, all of it.

    Args:
        sizes: int64 (s,), samples of each stratum.
        total: Samples to take, at most `sizes.sum()`.

    Returns:
        int64 (s,), summing to `total`. The smallest strata are settled first, and what does not divide goes to the
        largest.
    """
    budgets = np.zeros_like(sizes)
    rest = total
    for done, stratum in enumerate(np.argsort(sizes, kind="stable")):
        budgets[stratum] = min(int(sizes[stratum]), rest // (len(sizes) - done))
        rest -= int(budgets[stratum])
    return budgets
