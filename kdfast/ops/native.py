"""The only importer of the compiled extension, with what its callers share: dtype codes and instruction sets.

Each operator has its own ``native.py`` that passes tensors to the extension; the small ones are here.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kdfast import _native
from kdfast.ops.huge_pages import new_large

__all__ = ["DTYPE_CODES", "WIDEST_ISA", "crop_views", "extension", "gather_views", "isa", "permutation_element"]

extension = _native
"""The compiled module."""

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Must agree with ``csrc/common/dtype.h``."""

WIDEST_ISA = 2
"""Default of ``isa_limit`` arguments, which tests set to 0 (baseline) or 1 (x86-64-v3) to compare instruction sets."""


def isa() -> str:
    """Return the widest instruction set that the kernels use here: "x86-64-v4", "x86-64-v3" or "default"."""
    name: str = extension.isa()
    return name


def gather_views(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    pad: int,
    flip: bool,
    dtype: torch.dtype,
    isa_limit: int = WIDEST_ISA,
) -> Tensor:
    """Compute ``kdfast.ops.views.gather_views`` on a CPU, with the same bits.

    Raises:
        ValueError: If a row or a view id is out of range.
    """
    images, view_ids, affine = images.contiguous(), view_ids.contiguous(), affine.contiguous()
    rows = None if rows is None else rows.contiguous()
    count, height, width, channels = images.shape
    out = new_large(images, (len(view_ids), height, width, channels), dtype)
    extension.gather_views(
        images.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        view_ids.data_ptr(),
        affine[0].data_ptr(),
        affine[1].data_ptr(),
        count,
        len(view_ids),
        height,
        width,
        pad,
        flip,
        out.data_ptr(),
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
        isa_limit,
    )
    return out.permute(0, 3, 1, 2)


def crop_views(
    images: Tensor,
    rows: Tensor | None,
    boxes: Tensor,
    affine: Tensor,
    size: tuple[int, int],
    dtype: torch.dtype,
    isa_limit: int = WIDEST_ISA,
) -> Tensor:
    """Compute ``kdfast.ops.views.crop_views`` on a CPU, with the same bits.

    Raises:
        ValueError: If a row is out of range or a box leaves its image.
    """
    images, boxes, affine = images.contiguous(), boxes.contiguous(), affine.contiguous()
    rows = None if rows is None else rows.contiguous()
    count, height, width, channels = images.shape
    out = new_large(images, (len(boxes), *size, channels), dtype)
    extension.crop_views(
        images.data_ptr(),
        0 if rows is None else rows.data_ptr(),
        boxes.data_ptr(),
        affine[0].data_ptr(),
        affine[1].data_ptr(),
        count,
        len(boxes),
        height,
        width,
        *size,
        out.data_ptr(),
        DTYPE_CODES[dtype],
        torch.get_num_threads(),
        isa_limit,
    )
    return out.permute(0, 3, 1, 2)


def permutation_element(position: int, size: int, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Compute ``kdfast.data.stateless_random.permutation_element`` for one position and keys (n,): int64 (n,).

    Raises:
        ValueError: If the position or the size is out of range.
    """
    keys = np.ascontiguousarray(keys)
    out = np.empty(len(keys), np.int64)
    extension.shuffled_at(position, size, keys.ctypes.data, len(keys), out.ctypes.data, torch.get_num_threads())
    return out
