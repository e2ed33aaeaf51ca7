"""The registry of selection rules. A new rule is one function and one entry in RULES."""

from __future__ import annotations

from kdfast.errors import look_up
from kdfast.pruning.rules import beta, bws, ccs, d2, dual, rank
from kdfast.pruning.rules.base import Rule

RULES: dict[str, Rule] = {
    "hard": Rule(rank.select_hardest, "keep the highest scores"),
    "easy": Rule(rank.select_easiest, "keep the lowest scores"),
    "moderate": Rule(rank.select_moderate, "keep the middle of the ranking"),
    "random": Rule(rank.select_random, "keep random samples and ignore the scores"),
    "strata": Rule(
        ccs.select_stratified,
        "CCS: drop the hardest samples, then keep the same number from every stratum of the score",
        ccs.OPTIONS,
        resolve_defaults=ccs.resolve_defaults,
    ),
    "beta": Rule(beta.beta, "draw with a Beta density over the ranks (0 easiest, 1 hardest)", beta.OPTIONS),
    "d2": Rule(
        d2.d2,
        "D2: balance score and diversity by messages on a graph of nearest neighbors",
        d2.OPTIONS,
        frozenset({"features"}),
        {("cut_by", d2.AUM): d2.AUM},
        d2.resolve_defaults,
        d2.cut_pool,
    ),
    "bws": Rule(
        bws.select_window,
        "BWS: keep consecutive ranks: those on which a linear classifier of the features learns all samples best",
        bws.OPTIONS,
        frozenset({"features"}),
        resolve_defaults=bws.resolve_defaults,
        defaults_need_features=True,
    ),
    "dual": Rule(
        dual.dual,
        "DUAL: draw by the score and a Beta density over the mean probability of the label",
        dual.OPTIONS,
        frozenset({dual.MEAN_P}),
        resolve_defaults=dual.resolve_defaults,
    ),
}


def get_rule(name: str) -> Rule:
    """Return a rule by name.

    Raises:
        UsageError: There is no such rule; the nearest name is suggested.
    """
    return look_up(RULES, name, "selection rule")
