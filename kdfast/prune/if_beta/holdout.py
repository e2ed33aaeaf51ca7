"""The split of the training set into a pool, which policies draw from, and a held-out part, which judges them.

The test split takes no part. The teacher has seen the held-out part too; what the reward measures is how well a proxy
that has not carries the teacher over to it.
"""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import DataError


def hold_out(
    labels: IntArray, classes: int, *, share: float = 0.05, least: int = 20, seed: int = 0
) -> tuple[IntArray, IntArray]:
    """Hold out a share of every class, and at least some samples of it, but never more than half of it.

    Args:
        labels: int64 (N,), classes in [0, C).
        classes: C.
        share: Share of each class to hold out, in (0, 0.5].
        least: Samples to hold out of each class where it has twice as many.
        seed: Seed of the choice.

    Returns:
        The pool and the held-out part: positions int64, ascending, disjoint, together all.

    Raises:
        DataError: A class has fewer than two samples, so one of the parts would lack it; or there are labels outside
            [0, C).
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < classes:
        raise DataError(f"labels from {labels.min()} to {labels.max()}: the teacher has the classes 0 to {classes - 1}")
    sizes = np.bincount(labels, minlength=classes)
    if sizes.min() < 2:
        raise DataError(
            f"class {sizes.argmin()} has {sizes.min()} training samples, and the held-out part or the pool would be "
            f"without it ({int((sizes < 2).sum())} such classes): leave that class out of the data"
        )
    counts = np.minimum(np.maximum(np.ceil(share * sizes).astype(np.int64), least), sizes // 2)
    keys = hash64(Purpose.HOLDOUT, seed, np.arange(len(labels), dtype=np.int64))
    order = np.lexsort((keys, labels))
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    held = np.sort(np.concatenate([order[s : s + n] for s, n in zip(starts, counts, strict=True)]))
    return np.setdiff1d(np.arange(len(labels), dtype=np.int64), held), held
