"""Select a subset from scores with a rule."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import numpy.typing as npt

from kdfast.data.arrays import as_labels, as_matrix, as_values
from kdfast.data.stateless_random import IntArray, Purpose, hash64, uniform
from kdfast.errors import UsageError
from kdfast.pruning.candidates import find_candidates
from kdfast.pruning.options import OptionValue, complete_options
from kdfast.pruning.rules.base import RuleInputs
from kdfast.pruning.rules.class_budget import BALANCE, find_budgets, select_by_class
from kdfast.pruning.rules.d2 import AUM
from kdfast.pruning.rules.dual import MEAN_P
from kdfast.pruning.rules.registry import get_rule

_HOW_TO_GET = {
    AUM: "the area under the margin: score with the method d2 on `dynamics` from kdfast "
    "dynamics, and choose the score to start from by its option score",
    "features": "the features of a teacher's cache: make one with kdfast cache and pass `cache`",
    MEAN_P: "the mean probability of the label: score with the method dual, on `dynamics` from kdfast dynamics",
}


@dataclass(frozen=True)
class RuleSelection:
    """The samples a rule selected.

    Attributes:
        ids: int64 (m,), ascending indices into the training split.
        options: Every option of the rule with the value used.
    """

    ids: IntArray
    options: Mapping[str, OptionValue]


def check_required(rule: str, options: Mapping[str, OptionValue], available: Collection[str]) -> None:
    """Check that a rule has its inputs.

    Args:
        rule: A key of `RULES`.
        options: Every option of the rule with its value.
        available: What there is: "features", and names of extras.

    Raises:
        UsageError: An input is missing; the message says how to get it.
    """
    entry = get_rule(rule)
    for need in sorted(entry.required(options)):
        if need not in available:
            cause = [f" with {name}={value}" for (name, value), extra in entry.needs_with.items() if extra == need]
            raise UsageError(f"rule {rule!r}{''.join(cause)} needs {_HOW_TO_GET[need]}")


def select_subset(
    scores: npt.ArrayLike,
    labels: npt.ArrayLike,
    fraction: float,
    *,
    rule: str = "hard",
    balance: str = "balanced",
    seed: int = 0,
    features: npt.ArrayLike | None = None,
    extras: Mapping[str, npt.ArrayLike] | None = None,
    options: Mapping[str, OptionValue] | None = None,
    exclude: IntArray | None = None,
    device: str = "cpu",
) -> RuleSelection:
    """Select a fraction of the training samples.

    Args:
        scores: Real numbers (N,), finite; higher = harder.
        labels: Integers (N,), classes in [0, C).
        fraction: Share to keep.
        rule: A key of `RULES`.
        balance: `balanced` gives each class a budget in proportion to its size (largest remainder), but at least one
            sample; `equal` gives every class the same budget, or all its samples if it has fewer; `unbalanced` ranks
            all samples together.
        seed: Seed of tie-breaks and of random draws.
        features: Real numbers (N, D), used in float32, for rules that need them.
        extras: Further values per sample, real numbers (N,) each, for rules that need them.
        options: The rule's options; the others have their defaults.
        exclude: int64 (k,), distinct indices of samples that must not be kept; None: none. The rule sees the others as
            if they were all there is, with the same random numbers.
        device: Device for expensive computations of the rule.

    Returns:
        Exactly round(fraction * N) samples, and the options used.

    Raises:
        DataError: The labels are no classes; or scores, features or extras differ from them in length, are not real
            numbers, or are not finite.
        SubsetError: The fraction keeps no sample, leaves a class empty, or needs samples that are excluded.
        UsageError: The rule, the balance or an option is unknown, or the rule lacks an input.
    """
    entry = get_rule(rule)
    if balance not in BALANCE:
        raise UsageError(f"balance {balance!r}: must be one of {', '.join(BALANCE)}")
    labels = as_labels(labels)
    n = len(labels)
    candidates = find_candidates(labels, fraction, balance, exclude)
    ids, own_labels = candidates.ids, candidates.take(labels)
    rows = None if features is None else as_matrix(features, n, "features")
    inputs = RuleInputs(
        scores=candidates.take(as_values(scores, n, "scores")),
        ties=uniform(hash64(Purpose.TIE, seed, ids)),
        count=candidates.count,
        fraction=candidates.fraction,
        seed=seed,
        ids=ids,
        extras={name: candidates.take(as_values(values, n, name)) for name, values in (extras or {}).items()},
        options=complete_options(f"rule {rule!r}", entry.options, options or {}),
        classes=int(labels.max()) + 1,
        device=device,
        labels=own_labels,
        budgets=find_budgets(own_labels, candidates.count, balance),
    )
    check_required(rule, inputs.options, {*inputs.extras, *({"features"} if rows is not None else ())})
    if rows is not None and entry.defaults_need_features and None in inputs.options.values():
        inputs = replace(entry.with_defaults(replace(inputs, features=candidates.take(rows))), features=None)
    inputs = entry.with_defaults(inputs)
    return RuleSelection(ids[select_by_class(entry, inputs, own_labels, balance, rows)], inputs.options)
