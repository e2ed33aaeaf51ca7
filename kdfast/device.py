"""Selection of the device and of the precision that suits it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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


def resolve_precision(name: str, device: torch.device) -> str:
    """Return the precision of a name.

    Args:
        name: `auto` (bf16 where the device computes faster with it, else fp32), `fp32`, `bf16` or `fp16`.
        device: Where the network runs.
    """
    if name != "auto":
        return name
    return "bf16" if bf16_is_fast(device) else "fp32"


def network_dtype(precision: str) -> torch.dtype:
    """Return the dtype of a network's convolutions and products in `fp32`, or in mixed precision `bf16` or `fp16`."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Return a context in which networks compute in a precision; in `fp32` it changes nothing."""
    import torch

    return torch.autocast(device.type, network_dtype(precision), enabled=precision != "fp32")


def is_slower_than_float32(precision: str, device: torch.device) -> bool:
    """Return whether a network trains slower in this precision than in fp32, which happens on CPUs."""
    return device.type == "cpu" and (precision == "fp16" or (precision == "bf16" and not bf16_is_fast(device)))


def bf16_is_fast(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16 products.

    CPUs need AMX or AVX512-BF16 (torch says so since 2.9; before, the answer is False). Without them, bfloat16 is
    converted back and forth.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
