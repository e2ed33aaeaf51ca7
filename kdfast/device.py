"""Selection of the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdfast.errors import UsageError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """Return the device of a name; on CUDA, also request deterministic convolutions.

    Args:
        name: `auto` (a CUDA device if available, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Raises:
        UsageError: The name is not one of these, or there is no such device.
    """
    import torch  # slow; the command line imports this module for its help

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise UsageError(f"`device` is {name!r}: must be auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise UsageError(f"`device` is {name!r}, but torch sees {count} CUDA devices: use cpu or auto")
        # Runs are reproducible only with the same convolution algorithms.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return torch.device(name)
