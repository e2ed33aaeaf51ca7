"""Split the number of samples to keep over the classes, and apply a rule class by class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.arrays import gather_groups, group_by_class
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import class_budgets
from kdfast.errors import SubsetError
from kdfast.pruning.rules.base import Rule, RuleInputs

# balanced means proportional: each class keeps its share of the data (largest remainder), but at least one sample;
# equal: every class keeps the same number, but no more than it has; unbalanced: all samples are ranked together.
BALANCE = ("balanced", "unbalanced", "equal")


def check_budgets(labels: IntArray, total: int, balance: str) -> None:
    """Check that no class would be empty, if classes have budgets.

    Raises:
        SubsetError: A class would be.
    """
    find_budgets(labels, total, balance)


def find_budgets(labels: IntArray, total: int, balance: str, available: IntArray | None = None) -> IntArray | None:
    """Return the number of samples to keep of each class, int64 (C,); None if all samples are ranked together.

    Args:
        labels: int64 (N,).
        total: Samples to keep.
        balance: One of `BALANCE`.
        available: int64 (C,), the samples that may be kept of each class; None: all.

    Raises:
        SubsetError: A class would be empty.
    """
    if balance == "unbalanced":
        return None
    try:
        return class_budgets(labels, total, "equal" if balance == "equal" else "proportional", available)
    except SubsetError as error:
        raise SubsetError(f"{error}; or pass `balance` unbalanced, to select from all samples together") from error


def select_by_class(
    rule: Rule, inputs: RuleInputs, labels: IntArray, balance: str, features: npt.NDArray[np.float32] | None
) -> IntArray:
    """Apply a rule to each class, or to all samples together.

    Args:
        rule: The rule.
        inputs: All samples as one group, without their features.
        labels: int64 (n,), of these.
        balance: One of `BALANCE`.
        features: float32 (N, D) of the whole training split, which may hold other samples too; or None.

    Returns:
        int64 (count,), ascending positions.

    Raises:
        SubsetError: A class would be empty.
    """
    pool = None if rule.pool is None else rule.pool(inputs)
    available = None if pool is None else np.bincount(labels[pool], minlength=inputs.classes)
    budgets = find_budgets(labels, inputs.count, balance, available)
    if pool is not None and len(pool) == len(labels):
        pool = None
    if budgets is None:
        part = inputs if pool is None else _part(inputs, pool, inputs.count)
        if features is not None:
            part = replace(part, features=features if len(part.ids) == len(features) else features[part.ids])
        kept_together = rule(part)
        return np.sort(kept_together if pool is None else pool[kept_together])
    groups = group_by_class(labels if pool is None else labels[pool])
    counts = [int(budgets[label]) for label in groups if budgets[label]]
    classes = [members if pool is None else pool[members] for label, members in groups.items() if budgets[label]]
    gathered: Iterable[Any] = [None] * len(classes)
    if features is not None:
        gathered = gather_groups(features, [inputs.ids[members] for members in classes])
    kept = []
    for members, count, rows in zip(classes, counts, gathered, strict=True):
        kept.append(members[rule(replace(_part(inputs, members, count), features=rows))])
    return np.sort(np.concatenate(kept))


def _part(inputs: RuleInputs, members: IntArray, count: int) -> RuleInputs:
    """Return some samples as a group, without their features."""
    return replace(
        inputs,
        scores=inputs.scores[members],
        ties=inputs.ties[members],
        count=count,
        ids=inputs.ids[members],
        features=None,
        extras={name: values[members] for name, values in inputs.extras.items()},
        labels=None if inputs.labels is None else inputs.labels[members],
        budgets=None,
    )
