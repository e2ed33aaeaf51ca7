"""How many samples a fraction keeps, and how a budget is divided among the classes."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.errors import SubsetError


def subset_size(n: int, fraction: float) -> int:
    """Return the number of samples that a fraction keeps: `round(fraction * n)`, halves to even.

    Args:
        n: Number of training samples.
        fraction: Fraction to keep, in (0, 1].

    Raises:
        SubsetError: The fraction is out of range or keeps no sample.
    """
    if not 0 < fraction <= 1:
        raise SubsetError(f"`fraction` is {fraction}: must be above 0 and at most 1")
    size = round(fraction * n)
    if size < 1:
        raise SubsetError(f"`fraction` is {fraction} of {n} samples, which keeps none: use a larger one")
    return size


def class_budgets(
    labels: IntArray,
    total: int,
    mode: Literal["proportional", "equal"] = "proportional",
    available: IntArray | None = None,
) -> IntArray:
    """Return the number of samples to keep of each class, `total` in sum, at least one of each.

    "proportional": in proportion to the class sizes, by largest remainder; a class whose share rounds to none keeps one
    sample, and the others divide the rest. "equal": the same number of each class, or one more if `total` is not
    divisible by the number of classes; a class with fewer samples keeps all of them, and the others divide the rest.
    Ties go to the lower label.

    Args:
        labels: `(n,)` int64 from 0; the classes are 0 to the largest label.
        total: Samples to keep, in `[1, n]`.
        mode: "proportional" or "equal".
        available: `(classes,)` int64, the samples that may be kept of each class: at least one of each class that has
            samples, and at least `total` in sum. A class that has too few keeps all of these, and the others divide the
            rest. None: all samples.

    Returns:
        `(classes,)` int64; 0 only for a class without samples.

    Raises:
        SubsetError: `total` is out of range, or smaller than the number of classes.
    """
    if not 1 <= total <= len(labels):
        raise SubsetError(f"{total} samples to keep of {len(labels)}: must be 1 to {len(labels)}")
    if mode not in ("proportional", "equal"):
        raise SubsetError(f"`mode` of class budgets is {mode!r}: must be 'proportional' or 'equal'")
    sizes = np.bincount(labels).astype(np.int64)
    classes = int((sizes > 0).sum())
    if total < classes:
        raise SubsetError(
            f"keeping {total} of {len(labels)} samples leaves {classes - total} of {classes} classes empty: keep at "
            f"least {classes}, one of each class, which is a `fraction` of {_round_up(classes / len(labels))}"
        )
    if mode == "equal":
        return _equal_budgets(sizes if available is None else available, total)
    return _proportional_budgets(sizes, total) if available is None else _capped_budgets(sizes, total, available)


def _capped_budgets(sizes: IntArray, total: int, available: IntArray) -> IntArray:
    capped = np.zeros(len(sizes), np.bool_)
    while True:
        shared = _proportional_budgets(np.where(capped, 0, sizes), total - int(available[capped].sum()))
        budgets = np.where(capped, available, shared)
        if (budgets <= available).all():
            return budgets
        capped |= budgets > available  # the share of the others only grows, so these stay too small


def _proportional_budgets(sizes: IntArray, total: int) -> IntArray:
    rest, budgets = sizes, np.zeros_like(sizes)
    while True:
        shared = total - int(budgets[rest == 0].sum())
        floor, remainder = np.divmod(shared * rest, max(1, rest.sum()))
        floor[np.argsort(-remainder, kind="stable")[: shared - int(floor.sum())]] += 1
        empty = (floor == 0) & (rest > 0)
        if not empty.any():
            return np.where(rest > 0, floor, budgets)
        budgets[empty] = 1
        rest = np.where(empty, 0, rest)


def _equal_budgets(sizes: IntArray, total: int) -> IntArray:
    budgets, open_classes = np.zeros_like(sizes), sizes > 0
    while True:
        each, more = divmod(total - int(budgets.sum()), max(1, int(open_classes.sum())))
        full = open_classes & (sizes <= each)
        if not full.any():
            budgets[open_classes] = each
            budgets[np.flatnonzero(open_classes)[:more]] += 1
            return budgets
        budgets[full] = sizes[full]
        open_classes &= ~full


def _round_up(share: float) -> str:
    """Return a share with four digits after the point, rounded up."""
    return f"{math.ceil(share * 1e4 - 1e-9) / 1e4:g}"
