"""Memory in huge pages for large tensors on a CPU.

The C library takes blocks above 32 MiB from the system and returns them when they are freed, and the system zeroes each
page at its first touch. With pages of 4 KiB, the first write to a new block takes longer than most work on it; with
pages of 2 MiB a fraction of that. Linux gives large pages to programs that ask for them, unless an administrator
forbids it.

Source: madvise(2), MADV_HUGEPAGE; https://docs.kernel.org/admin-guide/mm/transhuge.html
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["MIN_BYTES", "new_large"]

MIN_BYTES = 32 << 20
"""Smaller blocks may share pages with others, and are often used again without going back to the system."""


def new_large(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialized tensor on the device of ``like``, in huge pages if it is large and on a CPU.

    Args:
        like: The tensor whose device, and dtype unless given, it takes.
        shape: Its sizes.
        dtype: Its dtype.
    """
    tensor = like.new_empty(shape, dtype=dtype)
    size = tensor.numel() * tensor.itemsize
    has_memory = type(tensor) is Tensor and tensor.device.type == "cpu"  # a fake tensor has none
    if has_memory and size >= MIN_BYTES and (advise := _advise()) is not None:
        begin = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.data_ptr() + size) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(begin, end - begin, mmap.MADV_HUGEPAGE)  # a hint: where it is refused, pages stay small
    return tensor


@functools.cache
def _advise() -> Callable[[int, int, int], Any] | None:
    """Return the system's madvise, or None where there are no huge pages."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise
