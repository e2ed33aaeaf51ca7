"""Features, logits, labels and teacher logits of a softmax head, checked and read a tile of rows at a time.

Every head function goes over the data in tiles that a processor's cache holds, so that the data may be larger than the
memory: a memory-mapped array, or blocks that are read or computed when they are asked for.
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
    check_finite,
    check_labels,
    check_shapes,
    split_block,
)

__all__ = ["Features", "HeadData", "Progress", "Tile", "linear"]

Features: TypeAlias = "Array | Iterable[Block]"
Progress: TypeAlias = Callable[[int, int, str], None]

TILE_BYTES = {"cpu": 16 * 2**20}
LARGE_TILE_BYTES = 256 * 2**20
PIECEWISE_TILE_BYTES = 64 * 2**20
LEAST_ROWS = 256


class Tile(NamedTuple):
    """Some rows: features (n, D) without the bias, logits (n, C), labels (n,) and teacher logits (n, C)."""

    start: int
    x: Tensor
    z: Tensor
    y: Tensor | None
    t: Tensor | None

    def pick(self, rows: Tensor) -> Tile:
        """The rows (n,) of the tile, counted from its start."""
        x, z, y, t = (None if part is None else part[rows] for part in self[1:])
        assert x is not None
        assert z is not None
        return Tile(self.start, x, z, y, t)


class _Seen:
    """What reading the rows has shown; shared by all ``HeadData`` of the same rows."""

    checked = False
    labels: tuple[int, int] | None = None


class HeadData:
    """Rows of a softmax head. Reading them checks them, the first time through.

    Args:
        features: (N, D) tensor or (memory-mapped) array; or an iterable of blocks
            (features, logits, labels[, teacher]), and then ``logits``, ``labels`` and ``teacher`` are None here. A
            list, or any object whose ``__iter__`` starts anew, can be read several times; a generator only once.
        logits: (N, C), or None.
        labels: (N,) int64, or None.
        teacher: (N, C) teacher logits, or None.
        bias: Whether the head has a bias: a feature that is 1 for every sample.
        prefix: What stands before the arguments' names in messages.
        tile_rows: Rows of a tile; None chooses.
        needs_logits: Whether logits must be there; else ``at`` gives them.

    Raises:
        ShapeError: If shapes or devices do not fit.
        DataError: If there is no row.
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
            raise ShapeError(f"tile_rows is {tile_rows}: give a number of rows of at least 1, or None")
        self.prefix, self.bias, self.tile_rows = prefix, bias, tile_rows
        self.blocks: Iterable[Block]
        self.total = 0  # rows, 0 while they are not known
        if isinstance(features, (Tensor, np.ndarray)):
            self.blocks = [(features, logits, labels, teacher)]
            self.total = len(features)
        else:
            if any(x is not None for x in (logits, labels, teacher)):
                raise ShapeError(
                    f"{prefix}features are blocks, but {prefix}logits, labels or teacher are given beside them: "
                    "put them into the blocks, (features, logits, labels, teacher)"
                )
            self.blocks = features
        self.once = isinstance(self.blocks, Iterator)
        self._seen = _Seen()
        self._weights: Tensor | None = None
        self._peek(needs_logits)

    def _peek(self, needs_logits: bool) -> None:
        """Reads sizes and types off the first block."""
        source = iter(self.blocks)
        first = next(source, None)
        if first is None:
            raise DataError(f"{self.prefix}features hold no rows: give at least one sample")
        if self.once:
            self.blocks = itertools.chain([first], source)
        features, logits, _, _ = parts = split_block(first, self.prefix)
        if features.ndim != 2:
            raise ShapeError(f"{self.prefix}features have shape {tuple(features.shape)}: give (N, D)")
        self.features = int(features.shape[1])
        self.classes = 0
        if logits is None and needs_logits:
            raise ShapeError(f"{self.prefix}logits are missing: give (N, C) logits beside the features")
        if logits is not None:
            if logits.ndim != 2:
                raise ShapeError(f"{self.prefix}logits have shape {tuple(logits.shape)}: give (N, C)")
            self.classes = int(logits.shape[1])
            self._check_classes()
        tensors = [x for x in parts if isinstance(x, Tensor)]
        self.device = tensors[0].device if tensors else torch.device("cpu")
        floats = [as_tensor(x[:1]).dtype for x in (features, logits) if x is not None]
        self.dtype = torch.float64 if torch.float64 in floats else torch.float32

    def _check_classes(self) -> None:
        if self.classes < 2:
            raise ShapeError(
                f"{self.prefix}logits have {self.classes} class: a softmax over fewer than two classes has no gradient"
            )

    @property
    def dim(self) -> int:
        """D, the bias counted."""
        return self.features + int(self.bias)

    def at(self, weights: Tensor) -> HeadData:
        """The same rows with the logits that ``weights`` (C, D), the bias counted, give."""
        other = object.__new__(HeadData)
        other.__dict__.update(self.__dict__)
        other._weights, other.classes = weights, weights.shape[0]
        other._check_classes()
        return other

    def count_classes(self) -> int:
        """C by the teacher logits, else by the largest label plus one.

        Raises:
            DataError: If there are neither, or a label is negative.
        """
        most = -1
        for block in self.blocks:
            _, _, y, t = split_block(block, self.prefix)
            if t is not None and t.ndim == 2:
                return int(t.shape[1])
            if y is not None and len(y):
                most = max(most, int(y.max()))
        if most < 0:
            raise DataError(f"{self.prefix}labels and teacher say nothing about the classes: give classes=C")
        return most + 1

    def require_many(self, what: str) -> None:
        """Raises a DataError when the rows can be read only once."""
        if self.once:
            raise DataError(
                f"{self.prefix}features are an iterator, which can be read once, but {what} reads the data several "
                "times: give a list, or an object whose __iter__ starts anew"
            )

    def require_two_classes(self) -> None:
        """Raises a DataError when all labels read so far are the same class."""
        labels = self._seen.labels
        if labels is not None and labels[0] == labels[1]:
            raise DataError(f"{self.prefix}labels are all {labels[0]}: a head needs training samples of two classes")

    def tiles(
        self,
        width: int = 0,
        dtype: torch.dtype | None = None,
        progress: Progress | None = None,
        note: str = "",
        *,
        unchecked: tuple[str, ...] = (),
        piecewise: bool = False,
    ) -> Iterator[Tile]:
        """The rows in order.

        Args:
            width: Numbers a row that the caller computes beside features and logits, to size the tile.
            dtype: Floating type of what is yielded; None: ``self.dtype``.
            progress: Called with (rows done, rows in all or 0, note) after each tile.
            note: Passed on to ``progress``.
            unchecked: "features" and "logits" that make the caller's result not finite when they are not; it looks at
                that, and calls ``explain``. They are not looked at here, unless they can be read only once.
            piecewise: Whether the caller takes a tile in pieces that a cache holds, so that it may be larger.
        """
        dtype = dtype or self.dtype
        rows = self.rows_of_a_tile(width, dtype, piecewise=piecewise)
        start = 0
        for block in self.blocks:
            parts = split_block(block, self.prefix)
            if self.total and start + len(parts[0]) > self.total:
                self._refuse_count(f"over {self.total}")
            check_shapes(parts, self.features, self.classes, self.device, self._weights is None, self.prefix)
            for begin in range(0, len(parts[0]), rows):
                tile = self._tile(start + begin, [x if x is None else x[begin : begin + rows] for x in parts], dtype)
                if not self._seen.checked:
                    self._check(tile, () if self.once else unchecked)
                yield tile
                if progress is not None:
                    progress(tile.start + len(tile.x), self.total, note)
            start += len(parts[0])
        if start == 0:
            raise DataError(f"{self.prefix}features hold no rows: give at least one sample")
        if self.total not in (0, start):
            self._refuse_count(str(start))
        self.total, self._seen.checked = start, self._seen.checked or not unchecked

    def _refuse_count(self, rows: str) -> NoReturn:
        raise DataError(
            f"{self.prefix}features hold {rows} rows, and held {self.total} before: blocks must be the same ones "
            "each time they are read"
        )

    def explain(self, what: str, dtype: torch.dtype) -> NoReturn:
        """Raises a DataError for a result that is not finite: names the sample, or says that the result overflows."""
        if not self.once:
            self._seen.checked = False
            for _ in self.tiles():
                pass
        raise DataError(f"{what} overflow {dtype}: scale the features down, or give float64")

    def _check(self, tile: Tile, unchecked: tuple[str, ...]) -> None:
        for name, value in (("features", tile.x), ("logits", tile.z), ("teacher", tile.t)):
            if value is not None and name not in unchecked:
                check_finite(f"{self.prefix}{name}", value, tile.start)
        if tile.y is not None:
            low, high = check_labels(f"{self.prefix}labels", tile.y, self.classes, tile.start)
            seen = self._seen.labels or (low, high)
            self._seen.labels = min(low, seen[0]), max(high, seen[1])

    def rows_of_a_tile(self, width: int, dtype: torch.dtype, *, piecewise: bool = False) -> int:
        """Most rows that ``tiles`` yields at a time; arguments as there."""
        if self.tile_rows is not None:
            return self.tile_rows
        row = (self.features + 2 * self.classes + width) * dtype.itemsize
        size = PIECEWISE_TILE_BYTES if piecewise else TILE_BYTES.get(self.device.type, LARGE_TILE_BYTES)
        return max(LEAST_ROWS, size // row // 64 * 64)

    def _tile(self, start: int, parts: list[Array | None], dtype: torch.dtype) -> Tile:
        x, z, y, t = (None if part is None else as_tensor(part).detach().to(self.device) for part in parts)
        assert x is not None
        x = x.to(dtype)
        if self._weights is not None:
            z = linear(x, self._weights, self.bias)
        assert z is not None
        return Tile(start, x, z.to(dtype), None if y is None else y.long(), None if t is None else t.to(dtype))


def linear(x: Tensor, weights: Tensor, bias: bool) -> Tensor:
    """Logits (n, C) of features (n, D) under weights (C, D), or (C, D + 1) with a bias."""
    if bias:
        return torch.addmm(weights[:, -1], x, weights[:, :-1].mT)
    return x @ weights.mT
