"""The graph of exact nearest neighbors, computed without an N x N matrix: block by block, on any device."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.stateless_random import IntArray
from kdfast.ops.float32 import full_float32
from kdfast.pruning.rules.base import FloatArray

# Candidates beyond k: their distances prove that rounding has hidden no neighbor.
_SPARE = 8
# Size of a block of float32 distances, and of a block of float64 differences.
_BLOCK_BYTES = 1 << 27
# Columns per piece, of which only the minimum is compared at first.
_PIECE = 32


def nearest_neighbors(
    features: npt.NDArray[np.floating], k: int, *, device: str | torch.device = "cpu", block_bytes: int = _BLOCK_BYTES
) -> tuple[IntArray, FloatArray]:
    """Find the k nearest other samples of each sample, by Euclidean distance.

    A float32 matrix product finds k + 8 candidates, whose distances are then computed in float64. If the error bound of
    the product does not exclude every other sample, the whole row is computed in float64. So the result equals that of
    float64 throughout, on every device. Time grows as N^2 D, memory as N D plus one block.

    Args:
        features: (N, D), finite; rounded to float32.
        k: Neighbors per sample; all others if there are fewer than k.
        device: Device to compute on.
        block_bytes: Size of one block of distances.

    Returns:
        Neighbors int64 (N, min(k, N - 1)), nearest first and the lower index first at equal distance, and their
        distances, float64 of the same shape.
    """
    features = np.ascontiguousarray(features, np.float32)
    n, depth = features.shape
    k = min(k, n - 1)
    if k < 1:
        return np.zeros((n, 0), np.int64), np.zeros((n, 0))
    # Subtracting the mean changes no distance but lowers the norms, and with them the rounding errors.
    points = torch.from_numpy(features - features.mean(0, dtype=np.float64).astype(np.float32)).to(device)
    norms = points.double().square().sum(1)
    # The extra column makes one product yield |y|^2 - 2 x.y, without another pass over the block.
    right = torch.cat((points, norms.float()[:, None]), dim=1).T.contiguous()
    slack = 4 * (depth + 4) * torch.finfo(torch.float32).eps * float(norms.max())
    neighbors, distances = np.empty((n, k), np.int64), np.empty((n, k))
    step = min(n, max(1, block_bytes // (4 * n)))
    block = torch.empty(step, n, device=device)
    with full_float32():  # TF32 would void the error bound
        for start in range(0, n, step):
            rows = torch.arange(start, min(start + step, n), device=device)
            left = torch.cat((points[rows] * -2, points.new_ones(len(rows), 1)), dim=1)
            rough = torch.mm(left, right, out=block[: len(rows)])
            rough[torch.arange(len(rows), device=device), rows] = torch.inf
            found, squares = _resolve(rough, points, norms, rows, k, slack)
            neighbors[start : start + step], distances[start : start + step] = found.cpu(), squares.sqrt().cpu()
    return neighbors, distances


def undirected_graph(neighbors: IntArray, distances: FloatArray) -> tuple[IntArray, IntArray, FloatArray]:
    """Connect two samples if either is a neighbor of the other; return the graph in compressed sparse rows.

    Args:
        neighbors: int64 (N, k).
        distances: float64 (N, k).

    Returns:
        Where each sample's edges start, int64 (N + 1,); the samples at their other ends, int64 (E,), ascending for each
        sample; and their lengths, float64 (E,).
    """
    n, k = neighbors.shape
    here = np.repeat(np.arange(n, dtype=np.int64), k)
    there = neighbors.ravel()
    low, high = np.minimum(here, there), np.maximum(here, there)
    edges, first = np.unique(low * n + high, return_index=True)
    low, high, lengths = edges // n, edges % n, distances.ravel()[first]
    source, target = np.concatenate((low, high)), np.concatenate((high, low))
    order = np.lexsort((target, source))
    starts = np.searchsorted(source[order], np.arange(n + 1))
    return starts, target[order], np.concatenate((lengths, lengths))[order]


def _resolve(rough: Tensor, points: Tensor, norms: Tensor, rows: Tensor, k: int, slack: float) -> tuple[Tensor, Tensor]:
    """Return the neighbors (B, k) of the rows (B,) and their squared distances.

    `rough` (B, N) holds the squared distances minus the row's squared norm; `slack` bounds its rounding error.
    """
    n = len(points)
    spread = min(k + _SPARE, n - 1)
    lowest, candidates = _lowest(rough, spread)
    squares, found = _smallest(_squares(points, rows, candidates), candidates, k)
    if spread == n - 1:
        return found, squares
    floor = lowest.amax(1).double() + norms[rows] - slack
    for row in (squares[:, -1] >= floor).nonzero()[:, 0].tolist():
        others = torch.arange(n, device=rows.device)
        others = others[others != rows[row]][None]
        exact = _squares(points, rows[row : row + 1], others)
        squares[row], found[row] = (x[0] for x in _smallest(exact, others, k))
    return found, squares


def _lowest(rough: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the `count` lowest entries of each row (B, N) and their columns, in any order.

    They lie in the `count` pieces with the lowest minima, so one pass finds the minima and few entries are sorted.
    """
    whole = rough.shape[1] // _PIECE * _PIECE
    if whole // _PIECE < 2 * count:
        values, columns = rough.topk(count, dim=1, largest=False, sorted=False)
        return values, columns
    minima = rough[:, :whole].view(len(rough), -1, _PIECE).amin(2)
    pieces = minima.topk(count, dim=1, largest=False, sorted=False).indices
    inside = (pieces[:, :, None] * _PIECE + torch.arange(_PIECE, device=rough.device)).flatten(1)
    rest = torch.arange(whole, rough.shape[1], device=rough.device).expand(len(rough), -1)
    candidates = torch.cat((inside, rest), dim=1)
    values, places = rough.gather(1, candidates).topk(count, dim=1, largest=False, sorted=False)
    return values, candidates.gather(1, places)


def _squares(points: Tensor, rows: Tensor, candidates: Tensor) -> Tensor:
    """Return the squared distances of rows (B,) to candidates (B, m) in float64, a few candidates at a time."""
    step = max(1, _BLOCK_BYTES // (16 * points.shape[1] * len(rows)))
    own = points[rows][:, None].double()
    parts = range(0, candidates.shape[1], step)
    return torch.cat([(points[candidates[:, p : p + step]].double() - own).square().sum(-1) for p in parts], dim=1)


def _smallest(squares: Tensor, candidates: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k smallest of each row (B, m), the lower candidate first on ties: values and candidates (B, k)."""
    by_index = candidates.argsort(dim=1)
    squares, candidates = squares.gather(1, by_index), candidates.gather(1, by_index)
    order = squares.argsort(dim=1, stable=True)[:, :k]
    return squares.gather(1, order), candidates.gather(1, order)
