"""The loaders, and the rule that selects one.

To add a loader, write a class and an entry in LOADERS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.ffcv.read import BetonLoader, BetonSplit
from kdfast.data.resident import ResidentLoader
from kdfast.data.source import Split
from kdfast.errors import UsageError
from kdfast.files.inputs import total_memory

_MEMORY_SHARE = 4  # what stays in memory may take one quarter
_CONVERT = "write .beton files with kdfast data convert and use that folder as the data"


class Loader(Protocol):
    """Interface of loaders, which yield decoded batches of a split.

    Attributes:
        name: Key in LOADERS.
        compile_seconds: Time spent on compilation before the first batch, in seconds.
        table: All images of the split, uint8 `(N, H, W, 3)` on the device of the training, from which a step picks
            rows; None for a loader that yields them batch by batch.
    """

    name: str
    compile_seconds: float
    table: Tensor | None

    def batches(self, ids: npt.ArrayLike, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 `(b, H, W, 3)` batches of the samples `ids`, in their order; the last may be smaller.

        A batch is valid until the next one is requested. An iterator left early is closed by its `close()` or when its
        last reference is dropped.
        """

    def close(self) -> None:
        """Release the loader's resources."""


def _ffcv_loader(split: Split, device: torch.device) -> Loader:
    if not isinstance(split, BetonSplit):
        raise UsageError(f"the ffcv loader reads .beton files: {_CONVERT}, or set `loader` to resident")
    return BetonLoader(split)


LOADERS: dict[str, Callable[[Split, torch.device], Loader]] = {"resident": ResidentLoader, "ffcv": _ffcv_loader}
"""Name -> function of a split and a device that returns a loader."""


def make_loader(split: Split, kind: str = "auto", device: torch.device | str = "cpu") -> Loader:
    """Create the loader of a split.

    Args:
        split: What to load.
        kind: A key of LOADERS, or `auto`: resident if the decoded split fits in a quarter of the memory of `device`,
            else ffcv.
        device: Device of the training. The resident loader's batches are on it, the ffcv loader's on the CPU.

    Raises:
        UsageError: The kind is unknown, or the split is not a .beton file and ffcv is requested or is all that fits.
        BackendUnavailable: FFCV is needed and not installed.
    """
    target = torch.device(device)
    if kind == "auto":
        need = len(split) * int(np.prod(split.shape))
        kind = "resident" if fits_in_memory(need, target) else "ffcv"
        if kind == "ffcv" and not isinstance(split, BetonSplit):
            raise UsageError(
                f"the decoded images take {need / 1e9:.1f} GB, more than a quarter of the "
                f"{device_memory(target) / 1e9:.1f} GB of {target}: {_CONVERT}, or set `loader` to resident"
            )
    if kind not in LOADERS:
        raise UsageError(f"`loader` is {kind!r}: must be one of auto, {', '.join(LOADERS)}")
    return LOADERS[kind](split, target)


def fits_in_memory(size: int, device: torch.device) -> bool:
    """Return whether data of `size` bytes may stay in the memory of a device: it takes at most a quarter of it."""
    return size * _MEMORY_SHARE <= device_memory(device)


def device_memory(device: torch.device) -> int:
    """Return the memory of a device in bytes; for the CPU, that of the machine or the container's limit if smaller."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return total_memory()
