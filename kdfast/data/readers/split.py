"""The test split of data that has none: a seeded share of every class of the training images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kdfast.data.holdout import SplitPart
from kdfast.data.source import ArraySplit, Split
from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import DataError, UsageError

_MAX_SEED = 2**63


@dataclass(frozen=True)
class SplitRule:
    """How to take a test split from the training images.

    Attributes:
        share: Share of every class, in (0, 1).
        seed: Seed of the choice.
    """

    share: float
    seed: int = 0


def parse_split(value: str | float | None) -> SplitRule | None:
    """Return the rule that `split` names: a share such as 0.1, or a share and a seed such as "0.1:7"; None for None.

    Raises:
        UsageError: It is neither, or out of range.
    """
    if value is None:
        return None
    share, colon, seed = str(value).partition(":")
    try:
        rule = SplitRule(float(share), int(seed) if colon else 0)
    except ValueError:
        rule = SplitRule(math.nan)
    if not (0 < rule.share < 1 and 0 <= rule.seed < _MAX_SEED):
        raise UsageError(
            f"`split` is {value}: pass the share of the test split, above 0 and below 1, such as 0.1, or share and "
            "seed, such as 0.1:7"
        )
    return rule


def train_and_test(
    train: Split, test: Split | None, rule: SplitRule | None, path: str, looked_for: str
) -> tuple[Split, Split, tuple[str, ...]]:
    """Return the training and the test split, where data may lack a test split.

    Args:
        train: The training images.
        test: The test images of the data; None if it has none.
        rule: How to take them from the training images.
        path: The data, for messages.
        looked_for: Where test images were looked for, for the message.

    Returns:
        Both splits, and notes on what was decided.

    Raises:
        DataError: There are no test images and no rule.
        UsageError: There are test images and a rule.
    """
    if test is not None:
        if rule is not None:
            raise UsageError(f"`split` is {rule.share:g}, but {path} has a test split of its own: omit it")
        return train, test, ()
    if rule is None:
        raise DataError(
            f"{path} has no test split (looked for {looked_for}): add one, or take a share of every class with "
            "`split`, such as 0.1"
        )
    kept, taken = divide(train.labels, rule)
    alone = int((np.bincount(train.labels) == 1).sum())
    note = (
        f"{path} has no test split: {len(taken)} of {len(train)} training images, {rule.share:g} of every class (seed "
        f"{rule.seed}), are the test split"
    )
    notes = (f"{note}; {alone} classes with one image have none in it",) if alone else (note,)
    return part_of(train, kept), part_of(train, taken), notes


def divide(labels: IntArray, rule: SplitRule) -> tuple[IntArray, IntArray]:
    """Divide samples into those to train on and those to test on, by class.

    Of a class of n samples, round(share * n) are taken, but at least one and at most n - 1; of a class of one sample
    none. Which ones depends only on the seed and their indices.

    Args:
        labels: int64 (N,), classes.
        rule: Share and seed.

    Returns:
        The indices of both, int64, ascending, disjoint; their union is the whole.

    Raises:
        DataError: No class has two samples.
    """
    sizes = np.bincount(labels)
    counts = np.clip(np.floor(rule.share * sizes + 0.5).astype(np.int64), 1, None)
    counts = np.minimum(counts, np.maximum(sizes - 1, 0))
    if not counts.any():
        raise DataError("every class has a single image, and a test split needs two of a class: add images")
    keys = hash64(Purpose.SPLIT, rule.seed, np.arange(len(labels), dtype=np.int64))
    order = np.lexsort((keys, labels))
    place = np.arange(len(labels)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # within the class
    taken = np.zeros(len(labels), np.bool_)
    taken[order] = place < np.repeat(counts, sizes)
    return np.flatnonzero(~taken).astype(np.int64), np.flatnonzero(taken).astype(np.int64)


def part_of(split: Split, ids: IntArray) -> Split:
    """Return some samples of a split as a split; those of a split in memory stay one."""
    if isinstance(split, ArraySplit):
        return ArraySplit(split.images[ids], split.labels[ids], "part of the images")
    return SplitPart(split, ids)
