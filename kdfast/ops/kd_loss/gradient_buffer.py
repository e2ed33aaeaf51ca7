"""Reuse the memory of the last large gradient once nothing refers to it.

The C library returns large freed blocks to the system, always above 32 MiB and sometimes below, and the system hands
out fresh pages zeroed at their first touch. For a gradient of 32 MiB that takes three times as long as computing it, at
every training step. So the storage of the last gradient of 1 to 64 MiB is kept and used again.

It is used again only if this module holds the sole reference: the Python object has no other reference and the C++
storage no other owner. A gradient that a caller still holds in any form (``.grad``, a view, a saved tensor, a NumPy
array, a DLPack capsule, shared memory) has one and is never touched. Two threads never receive the same storage, since
taking it removes it from the list, which the interpreter lock makes atomic. Only CPU memory is reused, so captured CUDA
graphs are not affected.

``KDFAST_REUSE_GRADIENT=0`` switches this off, at the cost that ``docs/design/kernels.md`` reports.
"""

from __future__ import annotations

import math
import os
import sys

from torch import Tensor, UntypedStorage

from kdfast.ops._torch_compat import storage_use_count
from kdfast.ops.huge_pages import new_large

__all__ = ["MAX_BYTES", "MIN_BYTES", "new_gradient", "release"]

MIN_BYTES = 1 << 20
"""Smaller gradients come from the allocator, which reuses blocks of that size itself."""
MAX_BYTES = 64 << 20
"""Larger gradients are returned to the system; they come in huge pages where it has them."""

_kept: list[UntypedStorage] = []


def new_gradient(logits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return an uninitialized contiguous tensor of ``logits``' dtype, in the last gradient's memory if it is free."""
    size = math.prod(shape) * logits.itemsize
    if not MIN_BYTES <= size <= MAX_BYTES or os.environ.get("KDFAST_REUSE_GRADIENT") == "0":
        return new_large(logits, shape)
    storage = _take(size)
    if storage is None:
        storage = new_large(logits, shape).untyped_storage()
    if storage_use_count(storage) > 0:
        _kept[:] = [storage]
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    tensor: Tensor = logits.new_empty((0,)).set_(storage, 0, shape, strides)
    return tensor


def release() -> None:
    """Free the kept memory."""
    _kept.clear()


def _take(size: int) -> UntypedStorage | None:
    """Remove the kept storage from the list and return it if it has the right size and no other owner."""
    try:
        storage = _kept.pop()
    except IndexError:
        return None
    # Two Python references: the local variable and the argument of getrefcount.
    unreferenced = sys.getrefcount(storage) == 2 and storage_use_count(storage) == 1
    # A shared storage may be mapped by another process, which has no reference here.
    if unreferenced and not storage.is_shared() and size == storage.nbytes():
        return storage
    return None
