"""``crop_views`` on a GPU: one Triton kernel, whose programs each write a tile of one sample.

A program resizes the rows that its tile needs along the width, and adds them up along the height at once. Rows that two
lines or tiles share are resized again: crops are mostly enlarged, or reduced by little, so that a value is made of a
few pixels, which the caches hold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.triton_rows import device_of

__all__ = ["OPTIONS", "TILE", "crop_views", "crop_views_kernel"]

TILE = {"LINES": 16, "COLUMNS": 32}
# Without fused multiply-add, the product and the sum of the normalization are rounded separately, as everywhere.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit
def tap(x, k, extent, size):
    """Return the k-th pixel of ``extent`` that makes pixel ``x`` of ``size``, and the numerator of its weight."""
    reach = 2 * tl.maximum(extent, size)
    center = (2 * x + 1) * extent
    place = tl.maximum(center - reach + size, 0) // (2 * size) + k
    part = reach - tl.abs((2 * place + 1) * size - center)
    return place, tl.where(place < extent, tl.maximum(part, 0), 0)


@triton.jit
def weight(part, whole):
    """Return ``floor(2**22 part / whole + 1/2)``, divided in two steps of 11 bits so that nothing exceeds 32."""
    high = (part << 11) // whole
    rest = ((part << 11) - high * whole) << 11
    low = rest // whole
    return (high << 11) + low + tl.where(2 * (rest - low * whole) >= whole, 1, 0)


@triton.jit(do_not_specialize=["count", "height"])
def crop_views_kernel(
    images_ptr,  # (N, H, W, 3) uint8
    rows_ptr,  # (B,) int64, or None: sample i has image i
    boxes_ptr,  # (B, 5) int32
    affine_ptr,  # (2, 3) float32
    out_ptr,  # (B, h, w, 3)
    count,  # N
    height,
    line,  # 3 W
    out_height,
    out_line,  # 3 w
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write LINES x COLUMNS values of a view; launched over (samples, tiles of lines, tiles of columns)."""
    sample = tl.program_id(0).to(tl.int64)
    row = sample
    if rows_ptr is not None:
        row = tl.load(rows_ptr + sample)
    box = boxes_ptr + 5 * sample
    top, left = tl.load(box), tl.load(box + 1)
    tall, wide = tl.load(box + 2), tl.load(box + 3)
    flip = tl.load(box + 4)
    width, out_width = line // 3, out_line // 3
    valid = (row >= 0) & (row < count) & (flip >= 0) & (flip <= 1) & (top >= 0) & (left >= 0) & (tall >= 1)
    valid = valid & (wide >= 1) & (top <= height - tall) & (left <= width - wide)
    tall, wide = tl.where(valid, tall, 1), tl.where(valid, wide, 1)
    y = tl.program_id(1) * LINES + tl.arange(0, LINES)[:, None]
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    here = (y < out_height) & (column < out_line)
    known = (y < tl.where(valid, out_height, 0)) & (column < out_line)
    channel = column % 3
    x = column // 3
    x = tl.where(flip == 1, out_width - 1 - x, x)
    taps_down = (2 * tl.maximum(tall, out_height) + out_height - 1) // out_height
    taps_across = (2 * tl.maximum(wide, out_width) + out_width - 1) // out_width
    down = tl.zeros((LINES, 1), tl.int32)
    for k in range(taps_down):
        down += tap(y, k, tall, out_height)[1]
    across = tl.zeros((1, COLUMNS), tl.int32)
    for j in range(taps_across):
        across += tap(x, j, wide, out_width)[1]
    image = images_ptr + row * (height * line) + top * line + 3 * left
    total = tl.full((LINES, COLUMNS), 1 << 21, tl.int32)
    for k in range(taps_down):
        from_y, part_y = tap(y, k, tall, out_height)
        resized = tl.full((LINES, COLUMNS), 1 << 21, tl.int32)
        for j in range(taps_across):
            from_x, part_x = tap(x, j, wide, out_width)
            inside = known & (part_y > 0) & (part_x > 0)
            pixel = tl.load(image + (from_y * line + 3 * from_x + channel), mask=inside, other=0)
            resized += pixel.to(tl.int32) * weight(part_x, tl.maximum(across, 1))
        total += (resized >> 22) * weight(part_y, tl.maximum(down, 1))
    scale = tl.load(affine_ptr + channel)
    bias = tl.load(affine_ptr + 3 + channel)
    values = (total >> 22).to(tl.float32) * scale + tl.where(valid, bias, float("nan"))
    out = out_ptr + sample * (out_height * out_line)
    tl.store(out + (y * out_line + column), values.to(out_ptr.dtype.element_ty), mask=here)


def crop_views(
    images: Tensor, rows: Tensor | None, boxes: Tensor, affine: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Compute ``kdfast.ops.views.crop_views`` on a GPU, with the same bits.

    Raises:
        ShapeError: If an image or a result has 2**31 values or more.
    """
    count, height, width, channels = images.shape
    line, out_line = width * channels, size[1] * channels
    if max(height * line, size[0] * out_line) >= 2**31:
        raise ShapeError(f"`images` has shape {tuple(images.shape)}: pass images of fewer than 2**31 values each")
    out = torch.empty((len(boxes), *size, channels), dtype=dtype, device=images.device)
    if out.numel():
        grid = (len(boxes), triton.cdiv(size[0], TILE["LINES"]), triton.cdiv(out_line, TILE["COLUMNS"]))
        with device_of(images):
            crop_views_kernel[grid](
                images.contiguous(), None if rows is None else rows.contiguous(), boxes.contiguous(),
                affine.contiguous(), out, count, height, line, size[0], out_line, **TILE, **OPTIONS,
            )  # fmt: skip
    return out.permute(0, 3, 1, 2)
