"""Triton kernels over the rows of a batch: the sum of their weights, and their product with a factor each."""

from __future__ import annotations

import contextlib
import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "PARTS",
    "device_of",
    "processors",
    "scale_kernel",
    "scale_rows",
    "scale_rows_kernel",
    "weight_sum_kernel",
    "weight_sums",
]

PARTS = tl.constexpr(32)
"""Number of partial sums of ``weight_sums``: one for each lane of a warp."""


@triton.jit
def weight_sum_kernel(
    label_ptr,  # (N,) int64
    weights_ptr,  # (N,) float
    sums_ptr,  # (PARTS,) float32, out
    n,
    label_stride,
    ignore_index,
    HAS_LABELS: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum the weights of the non-ignored rows of every PARTS-th block, in a fixed order."""
    part = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(part.to(tl.int64) * BLOCK, n, PARTS * BLOCK):
        r = start + tl.arange(0, BLOCK)
        live = r < n
        if HAS_LABELS:
            live = live & (tl.load(label_ptr + r * label_stride, mask=live, other=ignore_index) != ignore_index)
        if HAS_WEIGHTS:
            total += tl.load(weights_ptr + r, mask=live, other=0.0).to(tl.float32)
        else:
            total += tl.where(live, 1.0, 0.0)
    tl.store(sums_ptr + part, tl.sum(total, 0))


def weight_sums(labels: Tensor | None, weights: Tensor | None, ignore_index: int) -> Tensor:
    """Return float32 (32,) on the device, which add up to the sum of the weights of the rows that are not ignored.

    The kernel that needs the sum adds them up, which saves a launch. The result is the same in every run: no addition
    is atomic.

    Args:
        labels: (N,) int64, or None if no row is ignored.
        weights: (N,) floating point, contiguous, or None if each is 1.
        ignore_index: Label of the rows to ignore.
    """
    rows = labels if labels is not None else weights
    assert rows is not None, "without labels and weights the sum is N"
    sums = torch.empty(PARTS.value, dtype=torch.float32, device=rows.device)
    n = rows.shape[0]
    block, warps = (1024, 4) if n <= 4096 * PARTS.value else (8192, 16)
    with device_of(rows):
        weight_sum_kernel[(PARTS.value,)](
            sums if labels is None else labels, sums if weights is None else weights, sums, n,
            0 if labels is None else labels.stride(0), ignore_index,
            HAS_LABELS=labels is not None, HAS_WEIGHTS=weights is not None, BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return sums


@triton.jit
def scale_kernel(
    grad_ptr,  # (n,) contiguous
    out_ptr,  # (n,) contiguous, may be grad_ptr
    factor_ptr,  # () float32
    n,
    scale,
    IN_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write grad * factor * scale to out; in place, read only the factor if the product of the factors is one."""
    factor = tl.load(factor_ptr) * scale
    if IN_PLACE:
        n = tl.where(factor == 1.0, 0, n)
    at = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n, tl.num_programs(0) * BLOCK):
        if start + BLOCK <= n:
            # In place, each of several masked loads would wait for the one before.
            g = tl.load(grad_ptr + start + at).to(tl.float32) * factor
            tl.store(out_ptr + start + at, g.to(out_ptr.dtype.element_ty))
        else:
            mask = at < n - start
            g = tl.load(grad_ptr + start + at, mask=mask).to(tl.float32) * factor
            tl.store(out_ptr + start + at, g.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_rows_kernel(
    grad_ptr,  # (n, c) contiguous
    out_ptr,  # (n, c) contiguous, may be grad_ptr
    factor_ptr,  # (n,) float32
    n,
    c,
    factor_stride,
    scale,
    ALIGN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the rows of grad, each times its factor and scale, to out; ALIGN divides c."""
    # The value does not change, but the compiler learns that it may load vectors of ALIGN elements.
    c = c // ALIGN * ALIGN
    tiles_of_row = tl.cdiv(c, COLUMNS)
    for tile in range(tl.program_id(0), tl.cdiv(n, ROWS) * tiles_of_row, tl.num_programs(0)):
        row = (tile // tiles_of_row).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        col = (tile % tiles_of_row).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
        at = row[:, None] * c + col[None, :]
        mask = (row < n)[:, None] & (col < c)[None, :]
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        factors = tl.load(factor_ptr + row * factor_stride, mask=row < n, other=0.0) * scale
        tl.store(out_ptr + at, (g * factors[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def scale_rows(grad: Tensor, factor: Tensor, scale: float, *, in_place: bool) -> Tensor:
    """Return ``grad * factor * scale``, rounded once; as ``native.scale_rows``, but without reading the factor."""
    out = grad if in_place else torch.empty_like(grad)
    if grad.numel():
        block = 16384 // grad.element_size()  # elements that a program has at a time: 64 bytes a thread
        programs = 4 * processors(grad.device)
        with device_of(grad):
            if factor.dim() == 1 and factor.stride(0) != 0:
                n, c = grad.shape
                columns = min(block, triton.next_power_of_2(c))
                rows = block // columns
                scale_rows_kernel[(min(triton.cdiv(n, rows) * triton.cdiv(c, columns), programs),)](
                    grad, out, factor, n, c, factor.stride(0), scale,
                    ALIGN=math.gcd(16, c), ROWS=rows, COLUMNS=columns, num_warps=8,
                )  # fmt: skip
            else:
                scale_kernel[(min(triton.cdiv(grad.numel(), block), programs),)](
                    grad, out, factor, grad.numel(), scale, IN_PLACE=in_place, BLOCK=block, num_warps=8
                )
    return out


@functools.cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors of a GPU; 1 for the CPU tensors of Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Select the tensor's device for launches; do nothing for the CPU tensors of Triton's interpreter."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
