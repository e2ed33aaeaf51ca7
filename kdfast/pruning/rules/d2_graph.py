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
# Columns of a block: with all of a million samples it would have a few rows only, for each of which all are read.
_COLUMNS = 1 << 15
# Columns per piece, of which only the minimum is compared at first.
_PIECE = 32


def nearest_neighbors(
    features: npt.NDArray[np.floating],
    k: int,
    *,
    device: str | torch.device = "cpu",
    block_bytes: int = _BLOCK_BYTES,
    columns: int = _COLUMNS,
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
        columns: Most samples whose distances to others are in one block.

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
    del features  # a copy as large as the points, if the caller has no use for it
    norms = torch.cat([part.double().square().sum(1) for part in torch.split(points, _COLUMNS)])
    slack = 4 * (depth + 4) * torch.finfo(torch.float32).eps * float(norms.max())
    neighbors, distances = np.empty((n, k), np.int64), np.empty((n, k))
    search = _RoughSearch(points, norms, min(columns, n), block_bytes)
    with full_float32():  # TF32 would void the error bound
        for start in range(0, n, search.rows):
            rows = torch.arange(start, min(start + search.rows, n), device=device)
            lowest, candidates = search.lowest(rows, min(k + _SPARE, n - 1))
            found, squares = _resolve(lowest, candidates, points, norms, rows, k, slack)
            part = slice(start, start + len(rows))
            neighbors[part], distances[part] = found.cpu(), squares.sqrt().cpu()
    return neighbors, distances


class _RoughSearch:
    """Squared distances to all samples in float32, minus the row's squared norm, of which the lowest are kept.

    Args:
        points: float32 (N, D).
        norms: float64 (N,), their squared norms.
        columns: Columns of a block of distances.
        block_bytes: Size of a block.

    Attributes:
        rows: Rows of a block.
    """

    def __init__(self, points: Tensor, norms: Tensor, columns: int, block_bytes: int) -> None:
        self._points, self._norms, self._columns = points, norms, columns
        self.rows = min(len(points), max(1, block_bytes // (4 * columns)))
        self._block = torch.empty(self.rows * columns, device=points.device)
        self._right = self._make_right(0) if columns == len(points) else None

    def lowest(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the `count` lowest of each row (B,) to other samples, and their samples; (B, count) each."""
        left = torch.cat((self._points[rows] * -2, self._points.new_ones(len(rows), 1)), dim=1)
        values, samples = left.new_empty(len(rows), 0), rows.new_empty(len(rows), 0)
        for first in range(0, len(self._points), self._columns):
            right = self._make_right(first) if self._right is None else self._right
            width = right.shape[1]
            rough = torch.mm(left, right, out=self._block[: len(rows) * width].view(len(rows), width))
            own = rows - first
            inside = (own >= 0) & (own < width)
            rough[inside.nonzero()[:, 0], own[inside]] = torch.inf
            found, places = _lowest(rough, min(count, width))
            values, samples = torch.cat((values, found), 1), torch.cat((samples, places + first), 1)
            if values.shape[1] > count:
                values, kept = values.topk(count, dim=1, largest=False, sorted=False)
                samples = samples.gather(1, kept)
        return values, samples

    def _make_right(self, first: int) -> Tensor:
        """Return samples from `first` on and their norms, (D + 1, columns).

        The extra row makes one product yield |y|^2 - 2 x.y, without another pass over the block.
        """
        part = slice(first, first + self._columns)
        return torch.cat((self._points[part], self._norms[part].float()[:, None]), dim=1).T


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


def _resolve(
    lowest: Tensor, candidates: Tensor, points: Tensor, norms: Tensor, rows: Tensor, k: int, slack: float
) -> tuple[Tensor, Tensor]:
    """Return the neighbors (B, k) of the rows (B,) and their squared distances.

    `lowest` (B, m) holds the squared distances to the candidates (B, m), minus the row's squared norm; those to all
    other samples are not lower. `slack` bounds their rounding error.
    """
    n = len(points)
    squares, found = _smallest(_squares(points, rows, candidates), candidates, k)
    if candidates.shape[1] == n - 1:
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
