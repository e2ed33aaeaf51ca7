"""The loaders, and the rule that picks one.

A new loader is one class and one entry in LOADERS.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.ffcv.read import BetonLoader, BetonSplit
from kdfast.data.resident import ResidentLoader
from kdfast.data.source import Split
from kdfast.errors import UsageError

_SHARE = 4
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CONVERT = "write betons with `kdfast data convert` and give that folder as the data"


class Loader(Protocol):
    """Streams decoded batches of a split.

    Attributes:
        name: Key in LOADERS of what really runs.
        compile_seconds: Time spent on compiling before the first batch, in seconds.
    """

    name: str
    compile_seconds: float

    def batches(self, ids: npt.ArrayLike, batch_size: int) -> Iterator[Tensor]:
        """Batches uint8 `(b, H, W, 3)` of the samples `ids`, in their order; the last may be smaller.

        A batch is valid until the next one is asked for. An iterator left early is closed by `close()` or when the last
        reference to it goes.
        """

    def close(self) -> None:
        """Free what the loader holds."""


def _ffcv_loader(split: Split, device: torch.device) -> Loader:
    if not isinstance(split, BetonSplit):
        raise UsageError(f"the ffcv loader reads betons; {_CONVERT}, or use --loader resident")
    return BetonLoader(split)


LOADERS: dict[str, Callable[[Split, torch.device], Loader]] = {"resident": ResidentLoader, "ffcv": _ffcv_loader}


def make_loader(split: Split, kind: str = "auto", device: torch.device | str = "cpu") -> Loader:
    """Make the loader of a split.

    Args:
        split: What to load.
        kind: A key of LOADERS, or `auto`: resident when the decoded split fits a quarter of the memory of `device`,
            else ffcv.
        device: Where training runs. The resident loader's batches are there, the ffcv loader's on the CPU.

    Returns:
        The loader; its `name` says which one it is.

    Raises:
        UsageError: An unknown kind, or ffcv is asked for (or is all that fits) and the split is not a beton.
        BackendUnavailable: FFCV is needed and not installed.
    """
    place = torch.device(device)
    if kind == "auto":
        need, have = len(split) * int(np.prod(split.shape)), device_memory(place)
        kind = "resident" if need * _SHARE <= have else "ffcv"
        if kind == "ffcv" and not isinstance(split, BetonSplit):
            raise UsageError(
                f"the decoded images take {need / 1e9:.1f} GB, more than a quarter of the {have / 1e9:.1f} GB of "
                f"{place}; {_CONVERT}, or insist with --loader resident"
            )
    if kind not in LOADERS:
        raise UsageError(f"the loader is {kind!r}; needed: auto, {', '.join(LOADERS)}")
    return LOADERS[kind](split, place)


def device_memory(device: torch.device) -> int:
    """Memory of a device in bytes; for the CPU what the machine has or the container may use, whichever is less."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in _CGROUP_LIMITS:
        limit = Path(name)
        # Without a limit the file is missing, or says `max`.
        text = limit.read_text().strip() if limit.is_file() else ""
        if text.isdigit():
            memory = min(memory, int(text))
    return memory
