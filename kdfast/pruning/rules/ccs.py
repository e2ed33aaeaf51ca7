"""Coverage-centric selection: drop the hardest samples, then keep the same number from every stratum of the score."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.pruning.options import Option, OptionValue
from kdfast.pruning.rules.base import RuleInputs, drop_hardest
from kdfast.pruning.rules.draw import rule_uniform

OPTIONS = {
    "strata": Option(50, "number of strata of equal width", low=1, high=1_000_000, integer=True),
    "cut": Option(
        None,
        "share of the hardest samples to drop first; automatic: .3 at f = .1 up to 10 classes, .5 up to 100, .3 above, "
        "less for larger f",
        low=0,
        high=1,
    ),
}
# The shares that the paper drops on CIFAR-10, CIFAR-100 and ImageNet when it keeps these fractions.
_FRACTIONS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_CUTS_10 = (0.3, 0.1, 0.1, 0.0, 0.0, 0.0)
_CUTS_100 = (0.5, 0.4, 0.2, 0.2, 0.1, 0.0)
_CUTS_1000 = (0.3, 0.2, 0.2, 0.1, 0.0, 0.0)


def default_cut(fraction: float, classes: int) -> float:
    """Return the share of the hardest samples to drop when `fraction` of all is kept.

    It is the paper's for the benchmark with the next higher number of classes, CIFAR-10, CIFAR-100 or ImageNet,
    interpolated linearly between the fractions there; nothing is dropped if everything is kept.
    """
    cuts = _CUTS_10 if classes <= 10 else _CUTS_100 if classes <= 100 else _CUTS_1000
    return float(np.interp(fraction, _FRACTIONS, cuts))


def resolve_defaults(inputs: RuleInputs) -> dict[str, OptionValue]:
    """Return the default cut at this fraction and number of classes."""
    return {"cut": default_cut(inputs.fraction, inputs.classes)}


def select_stratified(inputs: RuleInputs) -> IntArray:
    """Keep the same number from every stratum of the score, at random within a stratum.

    First drop the hardest `cut` share of the group, but leave at least `count` samples. The strata have equal width,
    from the lowest to the highest remaining score. Larger strata make up in equal parts for what small ones lack.

    Source:
        Zheng et al. 2023, Coverage-centric coreset selection for high pruning rates, Algorithm 1, with the cuts of
        appendix B. The public code has no class budgets (`balance` unbalanced here), and divides the area under the
        margin of probabilities into strata (margin=probability of the score ccs).
    """
    remaining = drop_hardest(inputs, inputs.number("cut"))
    scores = inputs.scores[remaining]
    number = int(inputs.number("strata"))
    stratum = np.zeros(len(remaining), np.int64)
    if len(remaining) and scores.max() > scores.min():
        position = (scores - scores.min()) / (scores.max() - scores.min())
        stratum = np.minimum((position * number).astype(np.int64), number - 1)
    budgets = stratum_budgets(np.bincount(stratum, minlength=number), inputs.count)
    order = np.lexsort((rule_uniform(inputs.seed, inputs.ids[remaining]), stratum))
    starts = np.searchsorted(stratum[order], np.arange(number))
    place_in_stratum = np.arange(len(remaining)) - starts[stratum[order]]
    return remaining[order[place_in_stratum < budgets[stratum[order]]]]


def stratum_budgets(sizes: IntArray, total: int) -> IntArray:
    """Split `total` over the strata in equal parts; a stratum that is too small contributes all its samples.

    Args:
        sizes: int64 (s,), samples in each stratum.
        total: Samples to keep, at most `sizes.sum()`.

    Returns:
        int64 (s,), with sum `total`. Strata are served in ascending order of size, and a remainder goes to the largest.
    """
    budgets = np.zeros_like(sizes)
    rest = total
    for done, stratum in enumerate(np.argsort(sizes, kind="stable")):
        budgets[stratum] = min(int(sizes[stratum]), rest // (len(sizes) - done))
        rest -= int(budgets[stratum])
    return budgets
