"""Loader that keeps a whole decoded split in the memory of a device."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.source import ArraySplit, Split, check_epoch_ids, id_blocks
from kdfast.data.stateless_random import IntArray
from kdfast.errors import UsageError


class ResidentLoader:
    """Load batches by gathering rows of one uint8 tensor.

    Args:
        split: The split, read once, in blocks. A loader on the CPU shares the memory of an `ArraySplit`.
        device: Device of the pixels and of the batches.

    Attributes:
        name: `resident`.
        compile_seconds: 0, because nothing is compiled.
        table: All images, uint8 `(N, H, W, 3)` on the device; None after `close`.
    """

    name = "resident"
    compile_seconds = 0.0

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        self.table: Tensor | None = _decoded(split, torch.device(device))

    def batches(self, ids: npt.ArrayLike, batch_size: int) -> Generator[Tensor, None, None]:
        """Gather the samples `ids` in their order.

        Args:
            ids: Distinct integers `(n,)`, n >= 1; copied, so later changes have no effect.
            batch_size: Samples per batch; the last batch may be smaller.

        Returns:
            Iterator of uint8 `(b, H, W, 3)` on the loader's device. All batches share one buffer, so a batch is valid
            until the next one is requested.

        Raises:
            SubsetError: The ids or the batch size are invalid, see `check_epoch_ids`.
            UsageError: The loader is closed.
        """
        if self.table is None:
            raise UsageError("the loader is closed: create another one")
        return _epoch(self.table, check_epoch_ids(ids, len(self.table), batch_size), batch_size)

    def close(self) -> None:
        """Release the memory."""
        self.table = None


def _epoch(table: Tensor, order: IntArray, batch_size: int) -> Generator[Tensor, None, None]:
    rows = table.flatten(1)
    positions = torch.from_numpy(order).to(rows.device)
    buffer = torch.empty((min(batch_size, len(order)), rows.shape[1]), dtype=torch.uint8, device=rows.device)
    for start in range(0, len(order), batch_size):
        chosen = positions[start : start + batch_size]
        batch = buffer[: len(chosen)]
        _gather(rows, chosen, batch)
        yield batch.view(-1, *table.shape[1:])


def _gather(rows: Tensor, positions: Tensor, out: Tensor) -> None:
    """Copy the rows at `positions` to `out`, both uint8 `(n, H * W * 3)`."""
    if rows.device.type == "cpu":
        # numpy copies in this thread; waiting for torch's threads costs many times the copy on busy cores. The mode
        # "clip" writes to `out` directly, and the positions have been checked.
        np.take(rows.numpy(), positions.numpy(), axis=0, out=out.numpy(), mode="clip")
    else:
        torch.index_select(rows, 0, positions, out=out)


def _decoded(split: Split, device: torch.device) -> Tensor:
    """Return all images of a split, uint8 `(N, H, W, 3)`."""
    if isinstance(split, ArraySplit):
        return torch.from_numpy(split.images).to(device)
    pixels = torch.empty((len(split), *split.shape), dtype=torch.uint8, device=device)
    for ids in id_blocks(split):
        pixels[int(ids[0]) : int(ids[-1]) + 1] = torch.from_numpy(split.read(ids)).to(device)
    return pixels
