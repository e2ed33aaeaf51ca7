"""The order in which samples are visited: seeded, resumable at any step, the same whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import SubsetError, UsageError


def epoch_order(ids: IntArray, seed: int, epoch: int) -> IntArray:
    """A random order of samples, drawn anew each epoch.

    Each sample's place is decided by a hash of (seed, epoch, sample), so the result is the same on any machine and
    depends on which ids are given, not on the order in which they are.

    Args:
        ids: `(n,)` int64 original sample indices, without repetition.
        seed: Seed of the run.
        epoch: From 0.

    Returns:
        `(n,)` int64, the ids permuted.
    """
    return ids[np.argsort(hash64(Purpose.ORDER, seed, epoch, ids), kind="stable")]


def batch_count(n: int, batch_size: int, *, drop_last: bool = False) -> int:
    """Number of global batches in an epoch.

    Args:
        n: Samples in the epoch.
        batch_size: Samples of a global batch, over all ranks.
        drop_last: Whether a last, smaller batch is left out.

    Raises:
        SubsetError: There would be no batch.
        UsageError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise UsageError(f"batch size {batch_size}: must be at least 1")
    if n < 1 or (drop_last and n < batch_size):
        raise SubsetError(f"{n} samples make no batch of {batch_size}: keep more samples or use a smaller batch")
    return n // batch_size if drop_last else -(-n // batch_size)


def rank_batches(
    order: IntArray,
    batch_size: int,
    *,
    start: int = 0,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = False,
) -> Iterator[IntArray]:
    """One rank's share of each global batch of an epoch.

    The order is cut into global batches first, and each of those into `world` contiguous shares whose sizes differ by
    at most one: put together, the shares are the same batches for any number of ranks. Of a smaller batch no rank gets
    more than of a larger one: its share of the first batch is its largest. A last, smaller batch may leave ranks with
    an empty share; they get it, so that all ranks make the same number of steps.

    Args:
        order: `(n,)` the epoch's order, the same on each rank.
        batch_size: Samples of a global batch, over all ranks.
        start: Number of global batches to skip: the step to resume at.
        rank: This rank, in `[0, world)`.
        world: Number of ranks, at most `batch_size`.
        drop_last: Whether a last, smaller batch is left out.

    Returns:
        An iterator of `(b,)` views of `order`, one for each global batch from `start` on.

    Raises:
        SubsetError: There is not one batch.
        UsageError: `start`, `rank` or `world` is out of range.
    """
    steps = batch_count(len(order), batch_size, drop_last=drop_last)
    if not 0 <= rank < world:
        raise UsageError(f"rank {rank} of {world}: must be in 0..{world - 1}")
    if world > batch_size:
        raise UsageError(f"batch size {batch_size} over {world} ranks: give each rank at least one sample of a batch")
    if not 0 <= start <= steps:
        raise UsageError(f"start at step {start}: the epoch has {steps} steps")
    batches = (order[k * batch_size : (k + 1) * batch_size] for k in range(start, steps))
    return (_share(batch, rank, world) for batch in batches)


def _share(batch: IntArray, rank: int, world: int) -> IntArray:
    """A rank's share of a batch; the first `len(batch) % world` ranks have one more than the others."""
    size, rest = divmod(len(batch), world)
    start = size * rank + min(rank, rest)
    return batch[start : start + size + (rank < rest)]
