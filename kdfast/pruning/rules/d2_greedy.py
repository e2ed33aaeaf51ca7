"""Greedy selection on a graph, with a lazy heap compiled by numba."""

from __future__ import annotations

import heapq
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.pruning.rules.base import FloatArray


def select_greedily(
    importance: FloatArray, starts: IntArray, ends: IntArray, weights: FloatArray, ranks: IntArray, count: int
) -> IntArray:
    """Repeatedly keep the sample i of highest u and lower its neighbors: u_j -= w_ij u_i.

    The heap holds an entry per sample that is not below its u. A stale entry at the top is pushed again with
    its current value, so the cost is O((N + count * degree) log N); a scan for every kept sample would cost O(N count).

    Args:
        importance: float64 (N,), u after the forward messages.
        starts: int64 (N + 1,), where each sample's edges start.
        ends: int64 (E,), the samples at their other ends.
        weights: float64 (E,), w_ij in [0, 1].
        ranks: int64 (N,), the lower first among equal u.
        count: Samples to keep, at most N.

    Returns:
        int64 (count,), positions in the order kept.
    """
    kept: IntArray = _select(importance.copy(), starts, ends, weights, ranks, count)
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
                if u[i] < 0:  # u[j] rose, and its entry must not lie below it
                    heapq.heappush(heap, (-u[j], ranks[j], j))
    return kept
