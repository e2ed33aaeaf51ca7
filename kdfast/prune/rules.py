"""Selection rules: which samples of a group to keep, given their scores; and the split of a budget over the classes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from kdfast.data.counter import Purpose, hash64, unit
from kdfast.data.subset import class_budgets, subset_size
from kdfast.errors import DataError, UsageError

Rule = Callable[[NDArray[np.float64], NDArray[np.float64], int], NDArray[np.int64]]

BALANCE = ("balanced", "unbalanced", "equal")


def hard(scores: NDArray[np.float64], ties: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Keep the highest scores.

    Args:
        scores: float64 (n,).
        ties: float64 (n,), seeded numbers that order samples of equal score.
        count: How many to keep.

    Returns:
        int64 (count,), positions into `scores`, highest first.
    """
    return np.lexsort((ties, -scores))[:count]


RULES: dict[str, Rule] = {"hard": hard}


def choose(
    scores: NDArray[np.float64],
    labels: NDArray[np.int64],
    fraction: float,
    *,
    rule: str = "hard",
    balance: str = "balanced",
    seed: int = 0,
) -> NDArray[np.int64]:
    """Choose a fraction of the training samples.

    Args:
        scores: float64 (N,), finite; higher = harder.
        labels: int64 (N,), classes in [0, C).
        fraction: Share to keep; exactly round(fraction * N) samples are.
        rule: A key of `RULES`.
        balance: `balanced` gives each class a budget in proportion to its size (largest remainder), `equal` the same
            budget to each class, `unbalanced` ranks all samples together.
        seed: Seed of the tie-breaks.

    Returns:
        int64 (m,), indices into the training split, ascending.

    Raises:
        DataError: If scores and labels differ in length or a score is not finite.
        SubsetError: If the fraction gives no sample, or leaves a class empty or short.
        UsageError: If `rule` or `balance` is unknown.
    """
    if scores.shape != labels.shape:
        raise DataError(f"{scores.shape[0]} scores for {labels.shape[0]} samples; score this data set again")
    if not np.isfinite(scores).all():
        raise DataError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite; score again")
    if rule not in RULES or balance not in BALANCE:
        raise UsageError(f"rule {rule!r} and balance {balance!r}; needed: one of {list(RULES)} and one of {BALANCE}")
    ties = unit(hash64(Purpose.TIE, seed, np.arange(len(labels), dtype=np.int64)))
    size = subset_size(len(labels), fraction)
    if balance == "unbalanced":
        return np.sort(RULES[rule](scores, ties, size))
    budgets = class_budgets(labels, size, "equal" if balance == "equal" else "proportional")
    kept = []
    for label, budget in enumerate(budgets):
        members = np.flatnonzero(labels == label)
        kept.append(members[RULES[rule](scores[members], ties[members], int(budget))])
    return np.sort(np.concatenate(kept))
