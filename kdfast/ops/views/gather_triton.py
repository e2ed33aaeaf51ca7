"""``gather_views`` on a GPU: one Triton kernel, whose programs each write a tile of one sample."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.triton_rows import device_of

__all__ = ["OPTIONS", "TILE", "gather_views", "gather_views_kernel"]

TILE = {"LINES": 32, "COLUMNS": 32}
# More warps would repeat the arithmetic of a column for fewer lines each. Without fused multiply-add, the product and
# the sum are rounded separately, as everywhere.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit(do_not_specialize=["count", "height", "pad"])
def gather_views_kernel(
    images_ptr,  # (N, H, W, 3) uint8
    rows_ptr,  # (B,) int64, or None: sample i has image i
    ids_ptr,  # (B,) int64
    affine_ptr,  # (2, 3) float32
    out_ptr,  # (B, H, W, 3)
    count,  # N
    height,
    line,  # 3 W
    pad,
    FLIPS: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write LINES x COLUMNS values of a view; launched over (samples, tiles of lines, tiles of columns)."""
    sample = tl.program_id(0).to(tl.int64)
    row = sample
    if rows_ptr is not None:
        row = tl.load(rows_ptr + sample)
    view = tl.load(ids_ptr + sample)
    side = 2 * pad + 1
    valid = (row >= 0) & (row < count) & (view >= 0) & (view < side * side * FLIPS)
    view = view.to(tl.int32)
    shift = view // FLIPS
    y = tl.program_id(1) * LINES + tl.arange(0, LINES)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    channel = column % 3
    start = tl.where(view % FLIPS == 1, line - 3 - column + 2 * channel, column)  # of the mirrored or the same pixel
    from_y = y + (shift // side - pad)
    from_column = start + 3 * (shift % side - pad)
    known_lines = tl.where(valid, height, 0)
    inside = (from_y >= 0) & (from_y < known_lines) & (from_column >= 0) & (from_column < line)
    here = (y < height) & (column < line)
    image = images_ptr + row * (height * line)
    pixel = tl.load(image + (from_y * line + from_column), mask=here & inside, other=0)
    scale = tl.load(affine_ptr + channel)
    bias = tl.load(affine_ptr + 3 + channel)
    values = pixel.to(tl.float32) * scale + tl.where(valid, bias, float("nan"))
    out = out_ptr + sample * (height * line)
    tl.store(out + (y * line + column), values.to(out_ptr.dtype.element_ty), mask=here)


def gather_views(
    images: Tensor, rows: Tensor | None, view_ids: Tensor, affine: Tensor, pad: int, flip: bool, dtype: torch.dtype
) -> Tensor:
    """Compute ``kdfast.ops.views.gather_views`` on a GPU, with the same bits.

    Raises:
        ShapeError: If an image has 2**31 values or more.
    """
    count, height, width, channels = images.shape
    line = width * channels
    if height * line >= 2**31:
        raise ShapeError(f"`images` has shape {tuple(images.shape)}: pass images of fewer than 2**31 values each")
    out = torch.empty((len(view_ids), height, width, channels), dtype=dtype, device=images.device)
    if out.numel():
        grid = (len(view_ids), triton.cdiv(height, TILE["LINES"]), triton.cdiv(line, TILE["COLUMNS"]))
        with device_of(images):
            gather_views_kernel[grid](
                images.contiguous(), None if rows is None else rows.contiguous(), view_ids.contiguous(),
                affine.contiguous(), out, count, height, line, pad,
                FLIPS=2 if flip else 1, **TILE, **OPTIONS,
            )  # fmt: skip
    return out.permute(0, 3, 1, 2)
