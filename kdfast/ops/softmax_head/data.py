"""Features, logits, labels and teacher logits of a softmax head, validated and read one tile of rows at a time.

The caller provides *blocks* of any number of rows. Functions compute one *tile* at a time, sized to fit a processor's
cache. So the data may exceed the memory: pass a memory-mapped array, or blocks that are read or computed on demand.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops.softmax_head.validation import (
    Array,
    Block,
    as_tensor,
    check_block,
    check_finite,
    check_labels,
    split_block,
)
from kdfast.progress import Progress

__all__ = ["Features", "HeadData", "Tile", "compute_logits"]

Features: TypeAlias = "Array | Iterable[Block]"

CPU_TILE_BYTES = 16 * 2**20
GPU_TILE_BYTES = 256 * 2**20
FUSED_TILE_BYTES = 64 * 2**20
MIN_TILE_ROWS = 256
_KEPT_BYTES = 1 << 30


class Tile(NamedTuple):
    """Consecutive rows: features (n, D) without the bias, logits (n, C), labels (n,) and teacher logits (n, C)."""

    start: int
    x: Tensor
    z: Tensor
    y: Tensor | None
    t: Tensor | None

    def select(self, rows: Tensor) -> Tile:
        """Return the rows (n,), counted from the start of the tile."""
        x, z, y, t = (None if part is None else part[rows] for part in self[1:])
        assert x is not None
        assert z is not None
        return Tile(self.start, x, z, y, t)


class _ReadState:
    """Results of checks in earlier passes over the rows; shared by all ``HeadData`` of the same rows."""

    checked = False
    label_range: tuple[int, int] | None = None


class HeadData:
    """Rows of a softmax head, validated on the first pass.

    Attributes:
        reduce: Adds up a tensor over the processes that hold the rows together; None if all rows are here. The Hessian
            and its Kronecker factors heed it, and so does `count_rows`.

    Args:
        features: (N, D) tensor or (memory-mapped) array; or an iterable of blocks
            (features, logits, labels[, teacher]), with ``logits``, ``labels`` and ``teacher`` None here. A list, or any
            object whose ``__iter__`` restarts, can be read several times; a generator only once.
        logits: (N, C), or None.
        labels: (N,) int64, or None.
        teacher: (N, C) teacher logits, or None.
        bias: Whether the head has a bias: a feature that is 1 for every sample.
        prefix: Prefix of the arguments' names in messages, such as "val_".
        tile_rows: Rows of a tile; None chooses.
        needs_logits: Whether logits are required; if not, ``with_weights`` computes them.

    Raises:
        ShapeError: If shapes or devices do not fit.
        DataError: If there are no rows.
    """

    def __init__(
        self,
        features: Features,
        logits: Array | None,
        labels: Array | None = None,
        teacher: Array | None = None,
        *,
        bias: bool = True,
        prefix: str = "",
        tile_rows: int | None = None,
        needs_logits: bool = True,
    ) -> None:
        if tile_rows is not None and tile_rows < 1:
            raise ShapeError(f"`tile_rows` is {tile_rows}: pass a number of rows of at least 1, or None")
        self.prefix, self.bias, self.tile_rows = prefix, bias, tile_rows
        self.blocks: Iterable[Block]
        self.reduce: Callable[[Tensor], Tensor] | None = None
        self.num_rows = 0  # until the end of the first pass, if features are blocks
        if isinstance(features, (Tensor, np.ndarray)):
            self.blocks = [(features, logits, labels, teacher)]
            self.num_rows = len(features) if features.ndim else 0
        else:
            if any(x is not None for x in (logits, labels, teacher)):
                raise ShapeError(
                    f"`{prefix}features` are blocks, but `{prefix}logits`, `{prefix}labels` or `teacher` is passed as "
                    "well: put them into the blocks, (features, logits, labels, teacher)"
                )
            self.blocks = features
        self.single_pass = isinstance(self.blocks, Iterator)
        self._state = _ReadState()
        self._weights: Tensor | None = None
        self._read_sizes(needs_logits)

    def _read_sizes(self, needs_logits: bool) -> None:
        """Read sizes, device and dtype from the first block."""
        source = iter(self.blocks)
        first = next(source, None)
        if first is None:
            self._raise_empty()
        if self.single_pass:
            self.blocks = itertools.chain([first], source)
        features, logits, _, _ = parts = split_block(first, self.prefix)
        if features.ndim != 2:
            raise ShapeError(f"`{self.prefix}features` has shape {tuple(features.shape)}: pass (N, D)")
        self.num_features = int(features.shape[1])
        self.num_classes = 0
        if logits is None and needs_logits:
            raise ShapeError(f"`{self.prefix}logits` is missing: pass (N, C) logits along with the features")
        if logits is not None:
            if logits.ndim != 2:
                raise ShapeError(f"`{self.prefix}logits` has shape {tuple(logits.shape)}: pass (N, C)")
            self.num_classes = int(logits.shape[1])
            self._check_num_classes()
        tensors = [x for x in parts if isinstance(x, Tensor)]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        dtypes = [as_tensor(x[:1]).dtype for x in (features, logits) if x is not None]
        self.dtype = torch.float64 if torch.float64 in dtypes else torch.float32

    def _check_num_classes(self) -> None:
        if self.num_classes < 2:
            raise ShapeError(
                f"`{self.prefix}logits` has {self.num_classes} class: a softmax over fewer than two classes has no "
                "gradient; pass logits of at least two"
            )

    def _raise_empty(self) -> NoReturn:
        raise DataError(f"`{self.prefix}features` has no rows: pass at least one sample")

    @property
    def dim(self) -> int:
        """D, including the bias."""
        return self.num_features + int(self.bias)

    def count_rows(self) -> int:
        """Return the rows of all processes together, after the first pass; every process must call it."""
        if self.reduce is None:
            return self.num_rows
        return int(self.reduce(torch.tensor(self.num_rows, device=self.device)))

    def with_weights(self, weights: Tensor) -> HeadData:
        """Return the same rows with the logits of a head with ``weights`` (C, D), which include the bias."""
        other = object.__new__(HeadData)
        other.__dict__.update(self.__dict__)
        other._weights, other.num_classes = weights, weights.shape[0]
        other._check_num_classes()
        return other

    def with_kept_logits(self, weights: Tensor) -> HeadData:
        """Like ``with_weights``, but compute the logits once, in float32, if they take less than 1 GiB."""
        other = self.with_weights(weights)
        one_block = isinstance(self.blocks, list) and len(self.blocks) == 1
        if not one_block or 4 * self.num_rows * other.num_classes > _KEPT_BYTES:
            return other
        z = torch.empty(self.num_rows, other.num_classes, dtype=torch.float32, device=self.device)
        for tile in other.tiles(dtype=torch.float32):
            z[tile.start : tile.start + len(tile.x)] = tile.z
        ((x, _, y, t),) = (split_block(block, self.prefix) for block in self.blocks)
        other.blocks, other._weights = [(x, z, y, t)], None
        return other

    def infer_num_classes(self) -> int:
        """Return C from the teacher logits, else the largest label plus one.

        Raises:
            DataError: If there are neither, or every label is negative.
        """
        largest = -1
        for block in self.blocks:
            _, _, y, t = split_block(block, self.prefix)
            if t is not None and t.ndim == 2:
                return int(t.shape[1])
            if y is not None and len(y):
                largest = max(largest, int(as_tensor(y).long().max()))
        if largest < 0:
            raise DataError(
                f"`{self.prefix}labels` and `teacher` do not determine the number of classes: pass `classes`"
            )
        return largest + 1

    def require_multiple_passes(self, reader: str) -> None:
        """Raise a DataError if the rows can be read only once."""
        if self.single_pass:
            raise DataError(
                f"`{self.prefix}features` is an iterator, which can be read only once, but {reader} reads the data "
                "several times: pass a list, or an object whose __iter__ restarts"
            )

    def require_two_classes(self) -> None:
        """Raise a DataError if all labels read so far are of the same class, and other processes hold none."""
        if self.reduce is not None:
            return
        seen = self._state.label_range
        if seen is not None and seen[0] == seen[1]:
            raise DataError(f"`{self.prefix}labels` are all {seen[0]}: pass training samples of at least two classes")

    def tiles(
        self,
        width: int = 0,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        note: str = "",
        *,
        deferred_checks: tuple[str, ...] = (),
        fused: bool = False,
    ) -> Iterator[Tile]:
        """Yield the rows in order.

        Args:
            width: Numbers that the caller computes per row besides features and logits; reduces the tile's rows.
            dtype: Floating dtype of the tiles; None: that of the weights, if there are weights, or ``self.dtype``.
            progress: Called with (rows done, rows in total or 0 if unknown, note) after each tile.
            note: Passed on to ``progress``.
            deferred_checks: "features" and "logits", if they make the caller's result non-finite whenever they are. The
                caller checks the result and calls ``raise_nonfinite``. Rows that can be read only once are checked here
                anyway.
            fused: Whether the caller itself divides a tile into pieces that fit the cache, so that tiles may be larger.
        """
        dtype = dtype or (self.dtype if self._weights is None else self._weights.dtype)
        rows = self.rows_per_tile(width, dtype, fused=fused)
        start = 0
        for block in self.blocks:
            parts = split_block(block, self.prefix)
            if self.num_rows and start + len(parts[0]) > self.num_rows:
                self._raise_changed(f"over {self.num_rows}")
            check_block(parts, self.num_features, self.num_classes, self.device, self._weights is None, self.prefix)
            for begin in range(0, len(parts[0]), rows):
                tile = self._tile(start + begin, [x if x is None else x[begin : begin + rows] for x in parts], dtype)
                if not self._state.checked:
                    self._check(tile, () if self.single_pass else deferred_checks)
                yield tile
                if progress is not None:
                    progress(tile.start + len(tile.x), self.num_rows, note)
            start += len(parts[0])
        if start == 0:
            self._raise_empty()
        if self.num_rows not in (0, start):
            self._raise_changed(str(start))
        self.num_rows, self._state.checked = start, self._state.checked or not deferred_checks

    def _raise_changed(self, rows: str) -> NoReturn:
        raise DataError(
            f"`{self.prefix}features` has {rows} rows, but had {self.num_rows} before: yield the same blocks on every "
            "pass"
        )

    def raise_nonfinite(self, results: str, dtype: torch.dtype) -> NoReturn:
        """Raise a DataError for a non-finite result: it names the sample at fault, or reports an overflow."""
        if not self.single_pass:
            self._state.checked = False
            for _ in self.tiles():
                pass
        more = "" if dtype == torch.float64 else ", or pass float64"
        raise DataError(f"{results} overflow {dtype}: scale the features down{more}")

    def _check(self, tile: Tile, deferred_checks: tuple[str, ...]) -> None:
        for name, value in (("features", tile.x), ("logits", tile.z), ("teacher", tile.t)):
            if value is not None and name not in deferred_checks:
                check_finite(f"{self.prefix}{name}", value, tile.start)
        if tile.y is not None:
            low, high = check_labels(f"{self.prefix}labels", tile.y, self.num_classes, tile.start)
            seen = self._state.label_range or (low, high)
            self._state.label_range = min(low, seen[0]), max(high, seen[1])

    def rows_per_tile(self, width: int, dtype: torch.dtype, *, fused: bool = False) -> int:
        """Return the largest number of rows that ``tiles`` yields at a time, for the same arguments."""
        if self.tile_rows is not None:
            return self.tile_rows
        row = (self.num_features + 2 * self.num_classes + width) * dtype.itemsize
        size = CPU_TILE_BYTES if self.device.type == "cpu" else GPU_TILE_BYTES
        return max(MIN_TILE_ROWS, (FUSED_TILE_BYTES if fused else size) // row // 64 * 64)

    def _tile(self, start: int, parts: list[Array | None], dtype: torch.dtype) -> Tile:
        x, z, y, t = (None if part is None else as_tensor(part).detach().to(self.device) for part in parts)
        assert x is not None
        x = x.to(dtype)
        if self._weights is not None:
            z = compute_logits(x, self._weights.to(dtype), self.bias)
        assert z is not None
        return Tile(start, x, z.to(dtype), None if y is None else y.long(), None if t is None else t.to(dtype))


def compute_logits(x: Tensor, weights: Tensor, bias: bool) -> Tensor:
    """Return the logits (n, C) of features (n, D) for weights (C, D), or (C, D + 1) with a bias."""
    if bias:
        return torch.addmm(weights[:, -1], x, weights[:, :-1].mT)
    return x @ weights.mT
