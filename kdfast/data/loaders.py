"""The loaders, and the rule that selects one.

To add a loader, write a class and an entry in LOADERS.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.ffcv.read import BetonLoader, BetonSplit
from kdfast.data.readers.folders.file_loader import FileLoader, is_files
from kdfast.data.source import ArraySplit, Split, check_epoch_ids, id_blocks
from kdfast.data.stateless_random import IntArray
from kdfast.errors import UsageError
from kdfast.files.inputs import total_memory

_MEMORY_SHARE = 4  # what stays in memory may take one quarter
_CONVERT = "write .beton files with kdfast data convert and use that folder as the data"


class Loader(Protocol):
    """Interface of loaders, which yield decoded batches of a split.

    Attributes:
        name: Key in LOADERS.
        compile_seconds: Time spent on compilation before the first batch, in seconds.
        shape: Shape of every image, `(H, W, 3)`.
        table: All images of the split, uint8 `(N, H, W, 3)` on the device of the training, from which a step picks
            rows; None for a loader that yields them batch by batch.
    """

    name: str
    compile_seconds: float
    shape: tuple[int, int, int]
    table: Tensor | None

    def batches(self, ids: npt.ArrayLike, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 `(b, H, W, 3)` batches of the samples `ids`, in their order; the last may be smaller.

        A batch is valid until the next one is requested. An iterator left early is closed by its `close()` or when its
        last reference is dropped.
        """

    def close(self) -> None:
        """Release the loader's resources."""


class ResidentLoader:
    """Keep a whole decoded split in the memory of a device, and load batches by gathering rows of one uint8 tensor.

    Args:
        split: The split, read once, in blocks. A loader on the CPU shares the memory of an `ArraySplit`.
        device: Device of the pixels and of the batches.

    Attributes:
        name: `resident`.
        compile_seconds: 0, because nothing is compiled.
        shape: Shape of every image, `(H, W, 3)`.
        table: All images, uint8 `(N, H, W, 3)` on the device; None after `close`.
    """

    name = "resident"
    compile_seconds = 0.0

    def __init__(self, split: Split, device: torch.device | str = "cpu") -> None:
        self.shape = split.shape
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


def _file_loader(split: Split, device: torch.device) -> Loader:
    if not is_files(split):
        raise UsageError("the files loader reads image files, which this data is not made of: set `loader` to auto")
    return FileLoader(split)


def _ffcv_loader(split: Split, device: torch.device) -> Loader:
    if not isinstance(split, BetonSplit):
        raise UsageError(f"the ffcv loader reads .beton files: {_CONVERT}, or set `loader` to resident")
    return BetonLoader(split)


LOADERS: dict[str, Callable[[Split, torch.device], Loader]] = {
    "resident": ResidentLoader,
    "ffcv": _ffcv_loader,
    "files": _file_loader,
}
"""Name -> function of a split and a device that returns a loader."""


def make_loader(split: Split, kind: str = "auto", device: torch.device | str = "cpu") -> Loader:
    """Create the loader of a split.

    Args:
        split: What to load.
        kind: A key of LOADERS, or `auto`: resident if the decoded split fits in a quarter of the memory of `device`,
            else ffcv for .beton files and files for image files.
        device: Device of the training. The resident loader's batches are on it, those of the others on the CPU.

    Raises:
        UsageError: The kind is unknown or not for this split, or the split is too large and neither a .beton file nor
            image files.
        BackendUnavailable: FFCV is needed and not installed.
    """
    target = torch.device(device)
    return LOADERS[choose_loader(split, kind, target)](split, target)


def choose_loader(split: Split, kind: str, device: torch.device) -> str:
    """Return the key in LOADERS of the loader that `make_loader` makes.

    Raises:
        UsageError: The kind is unknown, or the split is too large and neither a .beton file nor image files.
    """
    if kind == "auto":
        need = len(split) * int(np.prod(split.shape))
        streamed = "ffcv" if isinstance(split, BetonSplit) else "files"
        kind = "resident" if fits_in_memory(need, device) else streamed
        if kind == "files" and not is_files(split):
            raise UsageError(
                f"the decoded images take {need / 1e9:.1f} GB, more than a quarter of the "
                f"{device_memory(device) / 1e9:.1f} GB of {device}: {_CONVERT}, or set `loader` to resident"
            )
    if kind not in LOADERS:
        raise UsageError(f"`loader` is {kind!r}: must be one of auto, {', '.join(LOADERS)}")
    return kind


def fits_in_memory(size: int, device: torch.device) -> bool:
    """Return whether data of `size` bytes may stay in the memory of a device: it takes at most a quarter of it."""
    return size * _MEMORY_SHARE <= device_memory(device)


def device_memory(device: torch.device) -> int:
    """Return the memory of a device in bytes; for the CPU, that of the machine or the container's limit if smaller."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_memory()


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
