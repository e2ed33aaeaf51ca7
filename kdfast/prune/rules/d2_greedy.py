"""Greedy selection on a graph with a lazy heap, compiled by numba."""

from __future__ import annotations

import heapq
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.prune.rules.base import FloatArray


def select(
    reached: FloatArray, starts: IntArray, ends: IntArray, weights: FloatArray, ranks: IntArray, count: int
) -> IntArray:
    """Keep the highest u again and again, each time lowering its neighbours: u_j -= w_ij u_i.

    A heap holds for each sample one entry that is not below its u. An entry found stale at the top goes back with the
    present value, so the whole costs O((N + count * degree) log N) where a scan each time costs O(N count).

    Args:
        reached: float64 (N,), u after the forward messages.
        starts: int64 (N + 1,), where each sample's edges start.
        ends: int64 (E,), the samples they lead to.
        weights: float64 (E,), w_ij in [0, 1].
        ranks: int64 (N,), the lower goes first among equal u.
        count: How many to keep, at most N.

    Returns:
        int64 (count,), in the order in which they were kept.
    """
    kept: IntArray = _select(reached.copy(), starts, ends, weights, ranks, count)
    return kept


@numba.njit
def _select(
    u: npt.NDArray[Any],
    starts: npt.NDArray[Any],
    ends: npt.NDArray[Any],
    weights: npt.NDArray[Any],
    ranks: npt.NDArray[Any],
    count: int,
) -> npt.NDArray[Any]:
    heap = [(-u[i], ranks[i], i) for i in range(len(u))]
    heapq.heapify(heap)
    taken = np.zeros(len(u), np.bool_)
    kept = np.empty(count, np.int64)
    done = 0
    while done < count:
        key, rank, i = heapq.heappop(heap)
        if taken[i]:
            continue
        if -key != u[i]:
            heapq.heappush(heap, (-u[i], rank, i))
            continue
        taken[i] = True
        kept[done] = i
        done += 1
        for edge in range(starts[i], starts[i + 1]):
            j = ends[edge]
            if not taken[j]:
                u[j] -= weights[edge] * u[i]
                if u[i] < 0:  # it rose: its entry must not lie below it
                    heapq.heappush(heap, (-u[j], ranks[j], j))
    return kept
