"""The order in which samples are visited: seeded, resumable at any step, and independent of the number of ranks."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kdfast.data.stateless_random import IntArray, Purpose, hash64
from kdfast.errors import SubsetError, UsageError


def epoch_order(ids: IntArray, seed: int, epoch: int) -> IntArray:
    """Return the samples in a random order that changes with each epoch.

    The position of a sample is determined by a hash of (seed, epoch, sample), so the result is the same on any machine
    and does not depend on the order of `ids`.

    Args:
        ids: `(n,)` int64 original sample indices, without repetition.
        seed: Seed of the run.
        epoch: From 0.

    Returns:
        `(n,)` int64, the ids permuted.
    """
    return ids[np.argsort(hash64(Purpose.ORDER, seed, epoch, ids), kind="stable")]


def batch_count(n: int, batch_size: int) -> int:
    """Return the number of global batches in an epoch; the last may be smaller.

    Args:
        n: Samples in the epoch.
        batch_size: Samples of a global batch, over all ranks.

    Raises:
        SubsetError: There are no samples.
        UsageError: `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise UsageError(f"`batch_size` is {batch_size}: pass at least 1")
    if n < 1:
        raise SubsetError(f"{n} samples do not make a batch of {batch_size}: keep more samples")
    return -(-n // batch_size)


def split_batches_by_rank(
    order: IntArray, batch_size: int, *, start: int = 0, rank: int = 0, world: int = 1
) -> Iterator[IntArray]:
    """Return one rank's share of each global batch of an epoch.

    The order is first cut into global batches, and each of those into `world` contiguous shares whose sizes differ by
    at most one, so the union of the shares is the same for any number of ranks. No rank's share of a smaller batch is
    larger than its share of a larger batch, so its share of the first batch is its largest. If the last batch has
    fewer samples than ranks, some shares are empty; they are returned, so that all ranks make the same number of steps.

    Args:
        order: `(n,)` order of the epoch, the same on each rank.
        batch_size: Samples of a global batch, over all ranks.
        start: Number of global batches to skip, that is, the step to resume at.
        rank: This rank, in `[0, world)`.
        world: Number of ranks, at most `batch_size`.

    Returns:
        An iterator of slices `(b,)` of `order`, one for each global batch from `start` on.

    Raises:
        SubsetError: There are no samples.
        UsageError: `start`, `rank` or `world` is out of range.
    """
    steps = batch_count(len(order), batch_size)
    if not 0 <= rank < world:
        raise UsageError(f"`rank` is {rank} of {world}: must be 0 to {world - 1}")
    if world > batch_size:
        raise UsageError(
            f"`batch_size` is {batch_size} for {world} ranks: pass at least {world}, one sample for each rank"
        )
    if not 0 <= start <= steps:
        raise UsageError(f"`start` is step {start}: must be 0 to {steps}, the steps of the epoch")
    batches = (order[k * batch_size : (k + 1) * batch_size] for k in range(start, steps))
    return (_share(batch, rank, world) for batch in batches)


def _share(batch: IntArray, rank: int, world: int) -> IntArray:
    """Return a rank's share of a batch; the first `len(batch) % world` ranks get one sample more than the others."""
    size, rest = divmod(len(batch), world)
    start = size * rank + min(rank, rest)
    return batch[start : start + size + (rank < rest)]
