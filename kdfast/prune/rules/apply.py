"""Select a subset from scores with a rule."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray, Purpose, hash64, uniform
from kdfast.data.subset import subset_size
from kdfast.errors import DataError, UsageError
from kdfast.prune.options import OptionValue, complete_options
from kdfast.prune.rules.base import FloatArray, Rule, RuleInputs
from kdfast.prune.rules.class_budget import BALANCE, select_by_class
from kdfast.prune.rules.dual import MEAN_P
from kdfast.prune.rules.registry import get_rule

_HOW_TO_GET = {
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


def select_subset(
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
) -> RuleSelection:
    """Select a fraction of the training samples.

    Args:
        scores: float64 (N,), finite; higher = harder.
        labels: int64 (N,), classes in [0, C).
        fraction: Share to keep.
        rule: A key of `RULES`.
        balance: `balanced` gives each class a budget in proportion to its size (largest remainder), but at least one
            sample; `equal` gives every class the same budget, or all its samples if it has fewer; `unbalanced` ranks
            all samples together.
        seed: Seed of tie-breaks and of random draws.
        features: float32 (N, D), for rules that need them.
        extras: Further values per sample, float64 (N,) each, for rules that need them.
        options: The rule's options; the others have their defaults.
        device: Device for expensive computations of the rule.

    Returns:
        Exactly round(fraction * N) samples, and the options used.

    Raises:
        DataError: Scores, features or extras differ from the labels in length or are not finite.
        SubsetError: The fraction keeps no sample, or leaves a class empty.
        UsageError: The rule, the balance or an option is unknown, or the rule lacks an input.
    """
    entry = get_rule(rule)
    if balance not in BALANCE:
        raise UsageError(f"balance {balance!r}: must be one of {', '.join(BALANCE)}")
    ids = np.arange(len(labels), dtype=np.int64)
    inputs = RuleInputs(
        scores=np.asarray(scores, dtype=np.float64),
        ties=uniform(hash64(Purpose.TIE, seed, ids)),
        count=subset_size(len(labels), fraction),
        fraction=fraction,
        seed=seed,
        ids=ids,
        features=features,
        extras=extras or {},
        options=complete_options(f"rule {rule!r}", entry.options, options or {}),
        classes=int(labels.max()) + 1,
        device=device,
    )
    _check_inputs(rule, entry, inputs)
    inputs = entry.with_defaults(inputs)
    return RuleSelection(select_by_class(entry, inputs, labels, balance), inputs.options)


def _check_inputs(name: str, rule: Rule, inputs: RuleInputs) -> None:
    n = len(inputs.ids)
    for what, values in {"scores": inputs.scores, **inputs.extras}.items():
        if values.shape != inputs.ids.shape:
            given = values.shape[0] if values.ndim == 1 else values.shape
            raise DataError(f"{given} {what} for {n} samples: score this data again")
        if not np.isfinite(values).all():
            raise DataError(f"{int((~np.isfinite(values)).sum())} of {n} {what} are not finite: score this data again")
    if inputs.features is not None and len(inputs.features) != n:
        raise DataError(
            f"features of {len(inputs.features)} samples for {n} samples: build the teacher's cache on this data"
        )
    for need in sorted(rule.needs):
        if (inputs.features is None) if need == "features" else (need not in inputs.extras):
            raise UsageError(f"rule {name!r} needs {_HOW_TO_GET[need]}")
