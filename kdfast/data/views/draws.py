"""Which views each sample has, and which of them it shows in an epoch."""

from __future__ import annotations

import numpy as np

from kdfast.data.stateless_random import IntArray, Purpose, hash64, permutation_element, permutation_prefix
from kdfast.data.views.spec import ViewSpec
from kdfast.errors import UsageError
from kdfast.ops.backends import resolve


def view_table(spec: ViewSpec, view_seed: int, sample_ids: IntArray, n_views: int) -> IntArray:
    """Return the view ids of each sample, by view index.

    Column 0 is the identity. The others are distinct and chosen per sample by the seed, so that a table of fewer views
    is a prefix of a table of more. With all views (`n_views == spec.count`) each row is `0, 1, ..., count - 1` instead.

    Args:
        spec: The set of views.
        view_seed: Seed of the choice.
        sample_ids: `(n,)` original sample indices.
        n_views: Views per sample, in `[1, spec.count]`.

    Returns:
        `(n, n_views)` int64 view ids.

    Raises:
        UsageError: `n_views` is out of range.
    """
    if not 1 <= n_views <= spec.count:
        raise UsageError(f"`n_views` is {n_views}, and this data has {spec.count} views: must be 1 to {spec.count}")
    if n_views == spec.count:
        return np.tile(np.arange(n_views, dtype=np.int64), (len(sample_ids), 1))
    out = np.full((len(sample_ids), n_views), spec.identity, np.int64)
    others = permutation_prefix(n_views - 1, spec.count - 1, hash64(Purpose.VIEW_TABLE, view_seed, sample_ids))
    out[:, 1:] = others + (others >= spec.identity)
    return out


def draw_view_indices(seed: int, epoch: int, sample_ids: IntArray, n_views: int) -> IntArray:
    """Draw the view index of each sample in an epoch.

    In each block of `n_views` epochs (0 to n_views - 1, and so on) a sample uses each of its views once, in an order
    drawn for each sample and block. A draw depends only on (seed, epoch, sample).

    Args:
        seed: Seed of the run.
        epoch: From 0.
        sample_ids: `(n,)` original sample indices.
        n_views: Views per sample, at least 1.

    Returns:
        `(n,)` int64 in `[0, n_views)`: columns of `view_table`.

    Raises:
        UsageError: `n_views` is less than 1 or the epoch is negative.
    """
    if n_views < 1 or epoch < 0:
        raise UsageError(f"{n_views} views per sample in epoch {epoch}: pass at least 1 view, and epochs from 0")
    block, position = divmod(epoch, n_views)
    keys = hash64(Purpose.VIEW_INDEX, seed, sample_ids, block)
    if resolve("draws", "cpu") == "native":
        from kdfast.ops import native

        return native.permutation_element(position, n_views, keys)
    return permutation_element(np.array([position], np.int64), n_views, keys)
