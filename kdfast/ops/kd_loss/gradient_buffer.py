"""Memory of the last large gradient, used again once nobody holds that gradient any more.

The system hands out memory page by page, zeroed, at its first touch. For a gradient of some megabytes that takes as
long as computing it, and a training loop frees it at each step, so it would be paid at each step.
"""

from __future__ import annotations

import math
import sys

import torch
from torch import Tensor, UntypedStorage

__all__ = ["LEAST_BYTES", "MOST_BYTES", "release", "tensor_like"]

LEAST_BYTES = 1 << 20
"""Smaller tensors come from the allocator, which keeps what is freed of them."""
MOST_BYTES = 64 << 20
"""Larger ones are given back to the system."""

_kept: list[UntypedStorage] = []
_users = getattr(torch._C, "_storage_Use_Count", None)


def tensor_like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Uninitialised contiguous CPU tensor of a shape, with the dtype of x and no gradient.

    Its memory may have been that of an earlier result that has been freed since. At most one such piece is kept, of at
    most ``MOST_BYTES``.
    """
    size = math.prod(shape) * x.itemsize
    if _users is None or not LEAST_BYTES <= size <= MOST_BYTES:
        return x.new_empty(shape)
    storage = _take(size)
    if storage is None:
        storage = x.new_empty(shape).untyped_storage()
    _kept[:] = [storage]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    tensor: Tensor = x.new_empty((0,)).set_(storage, 0, shape, strides)
    return tensor


def release() -> None:
    """Give the kept memory back."""
    _kept.clear()


def _take(size: int) -> UntypedStorage | None:
    """The kept memory when it fits and is free. Removed from where it is kept: no other thread takes it too."""
    try:
        storage = _kept.pop()
    except IndexError:
        return None
    # Counted are this object, which the variable alone refers to, and nothing of a tensor.
    free = sys.getrefcount(storage) == 2 and _users is not None and _users(storage._cdata) == 1
    # Another process may hold memory that a queue of torch.multiprocessing has moved to where it is shared.
    free = free and not storage.is_shared()
    return storage if free and size == storage.nbytes() else None
