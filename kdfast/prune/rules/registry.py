"""Selection rules: which samples of a group to keep, given their scores; and the split of a budget over the classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray, Purpose, hash64, unit
from kdfast.data.subset import class_budgets, subset_size
from kdfast.errors import DataError, UsageError, did_you_mean
from kdfast.prune.rules import ccs, d2, dual, rank
from kdfast.prune.rules.base import FloatArray, Option, OptionValue, Rule, RuleInputs

__all__ = ["BALANCE", "RULES", "Choice", "Option", "Rule", "RuleInputs", "choose", "decide", "rule_named"]

BALANCE = ("balanced", "unbalanced", "equal")

RULES: dict[str, Rule] = {
    "hard": Rule(rank.hard, "keep the highest scores"),
    "easy": Rule(rank.easy, "keep the lowest scores"),
    "moderate": Rule(rank.moderate, "keep the middle of the ranking"),
    "random": Rule(rank.random, "keep samples at random, whatever their scores"),
    "strata": Rule(
        ccs.strata,
        "CCS: drop the hardest, then the same number of each stratum of the score",
        ccs.OPTIONS,
        settle=ccs.settle,
    ),
    "beta": Rule(
        rank.beta,
        "draw with a Beta density over the ranks (0 easiest, 1 hardest)",
        {
            "a": Option(1.0, "first parameter of the density; above b prefers hard samples", low=1e-3, high=1e3),
            "b": Option(1.0, "second parameter; a = b = 1 is uniform", low=1e-3, high=1e3),
        },
    ),
    "d2": Rule(
        d2.d2,
        "D2: score and variety, by messages on a graph of neighbours",
        d2.OPTIONS,
        frozenset({"features"}),
        d2.settle,
    ),
    "dual": Rule(
        dual.dual,
        "DUAL: draw by the score and a Beta density over the mean p_y",
        dual.OPTIONS,
        frozenset({dual.MEAN_P}),
        dual.settle,
    ),
}

_SOURCES = {
    "features": "the features of a teacher's cache: give --cache (made by `kdfast cache`), or features= in Python",
    dual.MEAN_P: "the mean probability of the label, which `--method dual` computes from --dynamics "
    "(made by `kdfast dynamics`)",
}


@dataclass(frozen=True)
class Choice:
    """What a rule chose, and how.

    Attributes:
        ids: int64 (m,), indices into the training split, ascending.
        options: Every option of the rule with the value it had.
    """

    ids: IntArray
    options: Mapping[str, OptionValue]


def choose(scores: npt.ArrayLike, labels: IntArray, fraction: float, **how: Any) -> IntArray:
    """Choose a fraction of the training samples: the `ids` of `decide`, which see for arguments and errors."""
    return decide(scores, labels, fraction, **how).ids


def decide(
    scores: npt.ArrayLike,
    labels: IntArray,
    fraction: float,
    *,
    rule: str = "hard",
    balance: str = "balanced",
    seed: int = 0,
    features: npt.NDArray[np.float32] | None = None,
    extras: Mapping[str, FloatArray] | None = None,
    options: Mapping[str, OptionValue] | None = None,
    device: str = "cpu",
) -> Choice:
    """Choose a fraction of the training samples, and say with which options.

    Args:
        scores: float64 (N,), finite; higher = harder.
        labels: int64 (N,), classes in [0, C).
        fraction: Share to keep.
        rule: A key of `RULES`.
        balance: `balanced` gives each class a budget in proportion to its size (largest remainder), `equal` the same
            budget to each class, `unbalanced` ranks all samples together.
        seed: Seed of the tie-breaks and of the rules that draw.
        features: float32 (N, D), for the rules that need them.
        extras: Further numbers a sample, float64 (N,), for the rules that need them.
        options: The rule's options; those not given have their defaults.
        device: Where the heavy work of a rule runs.

    Returns:
        The samples, exactly round(fraction * N), and the options.

    Raises:
        DataError: If scores, features or extras differ from the labels in length or are not finite.
        SubsetError: If the fraction gives no sample, or leaves a class empty or short.
        UsageError: If a rule, balance or option is unknown, or the rule lacks an input.
    """
    chosen = rule_named(rule)
    if balance not in BALANCE:
        raise UsageError(f"balance {balance!r}: needed: one of {', '.join(BALANCE)}")
    values = np.asarray(scores, dtype=np.float64)
    ids = np.arange(len(labels), dtype=np.int64)
    everything = RuleInputs(
        scores=values,
        ties=unit(hash64(Purpose.TIE, seed, ids)),
        count=subset_size(len(labels), fraction),
        fraction=fraction,
        seed=seed,
        ids=ids,
        features=features,
        extras=extras or {},
        options=chosen.complete(rule, options or {}),
        classes=int(labels.max()) + 1,
        device=device,
    )
    _check(rule, chosen, everything)
    everything = chosen.settled(everything)
    if balance == "unbalanced":
        return Choice(np.sort(chosen(everything)), everything.options)
    budgets = class_budgets(labels, everything.count, "equal" if balance == "equal" else "proportional")
    return Choice(_from_each_class(chosen, everything, labels, budgets), everything.options)


def rule_named(name: str) -> Rule:
    """The rule of that name.

    Raises:
        UsageError: There is none; the nearest is suggested.
    """
    if name not in RULES:
        hint = did_you_mean(name, RULES)
        raise UsageError(f"no selection rule is named {name!r}: {hint}known: {', '.join(RULES)}")
    return RULES[name]


def _from_each_class(rule: Rule, whole: RuleInputs, labels: IntArray, budgets: IntArray) -> IntArray:
    kept = []
    for label in np.flatnonzero(budgets):
        members = np.flatnonzero(labels == label)
        kept.append(members[rule(_group(whole, members, int(budgets[label])))])
    return np.sort(np.concatenate(kept))


def _group(whole: RuleInputs, members: IntArray, count: int) -> RuleInputs:
    return replace(
        whole,
        scores=whole.scores[members],
        ties=whole.ties[members],
        count=count,
        ids=members,
        features=None if whole.features is None else whole.features[members],
        extras={name: values[members] for name, values in whole.extras.items()},
    )


def _check(name: str, rule: Rule, inputs: RuleInputs) -> None:
    for what, values in {"scores": inputs.scores, **inputs.extras}.items():
        if values.shape != inputs.ids.shape:
            given = values.shape[0] if values.ndim == 1 else values.shape
            raise DataError(f"{given} {what} for {len(inputs.ids)} samples; score this data set again")
        if not np.isfinite(values).all():
            wrong = int((~np.isfinite(values)).sum())
            raise DataError(f"{wrong} of {len(values)} {what} are not finite; score again")
    if inputs.features is not None and len(inputs.features) != len(inputs.ids):
        raise DataError(
            f"features of {len(inputs.features)} samples for {len(inputs.ids)} samples: build the cache on this data"
        )
    for need in sorted(rule.needs):
        if (inputs.features is None) if need == "features" else (need not in inputs.extras):
            raise UsageError(f"rule {name!r} needs {_SOURCES[need]}")
