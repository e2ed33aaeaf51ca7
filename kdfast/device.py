"""The device a command runs on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kdfast.errors import UsageError

if TYPE_CHECKING:
    import torch


def resolve_device(name: str) -> torch.device:
    """Turn `--device` into a device; on CUDA, also ask for deterministic convolutions.

    Args:
        name: `auto` (a CUDA device when there is one, else the CPU), `cpu`, `cuda` or `cuda:N`.

    Returns:
        The torch device.

    Raises:
        UsageError: If the name is none of these, or there is no such device.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()) or (kind == "cpu" and index):
        raise UsageError(f"--device is {name!r}; needed: auto, cpu, cuda or cuda:N")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if int(index or 0) >= count:
            raise UsageError(f"--device {name}: torch sees {count} CUDA devices here; use --device cpu or auto")
        # The same run gives the same bits only with the same convolution algorithms.
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    return torch.device(name)
