"""Cropped views: a box of the image, resized to one size, mirrored or not, normalized to floating point."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops._torch_compat import is_plain_eager
from kdfast.ops.views.checks import check_affine, check_images, check_indices, normalize, resolve_views

_BITS = 22  # of a weight; the sum of the products of weights and pixels fits in 32 bits
_MOST = 1 << 20  # the sum of the weights' numerators, so that they are divided in 32 bits
_MOST_PLACE = 1 << 29  # a place in an image, in units of half a pixel of both sizes, so that it is one of 32 bits


def crop_views(
    images: Tensor,
    boxes: Tensor,
    affine: Tensor,
    *,
    size: tuple[int, int],
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Crop a box from each image, resize it, optionally mirror it, and normalize.

    The resize is bilinear and antialiased. Its arithmetic is that of integers, so that all implementations are
    bit-equal; its pixels are those of Pillow's bilinear `resize` of the cropped box along the width, then along the
    height. (One `resize` to both may take the height first, since Pillow 13, and differ by a gray level.) Along an
    axis, pixel `x` of `o` is made of the pixels `j` of the `e` of the box with the numerators
    `n[j] = max(0, 2 m - |(2 j + 1) o - (2 x + 1) e|)`, where `m = max(o, e)`, and the weights
    `w[j] = floor(2**22 n[j] / sum(n) + 1/2)`. The new pixel is `floor((sum(w[j] p[j]) + 2**21) / 2**22)`, first for
    every row of the box along its width, then along its height. Normalization rounds the product with the scale, the
    sum with the bias, and the result to `dtype`.

    On a GPU nothing is copied to the host or waited for. There a row or box that is not as below cannot raise an error:
    the sample becomes NaN.

    Args:
        images: `(N, H, W, 3)` uint8, on any device: a batch, or the data set that `rows` selects from.
        boxes: `(B, 5)` int32 on the images' device: top, left, height, width in pixels, and flip in {0, 1}.
        affine: As for `gather_views`.
        size: Height and width of the result.
        rows: `(B,)` int64 on the images' device: the image of each sample, in `[0, N)`. None: sample i has image i,
            and B = N.
        dtype: Floating-point dtype of the result.
        backend: "auto", or the name of an implementation in the row "views" of `kdfast.ops.backends`.

    Returns:
        `(B, 3, h, w)` in `dtype` and channels_last memory format, on the device of the images.

    Raises:
        DataError: If the images are not uint8.
        ShapeError: If another shape, dtype or device is not as above, the images are far too large for the size, or, on
            a CPU, a row is out of range or a box leaves its image.
        BackendUnavailable: If a named implementation cannot run here.
    """
    if not torch.compiler.is_compiling() and is_plain_eager((images, rows, boxes, affine)):
        return _run(images, rows, boxes, affine, *size, dtype, backend)
    out: Tensor = _crop_views(images, rows, boxes, affine, *size, dtype, backend)
    return out


@torch.library.custom_op("kdfast::crop_views", mutates_args=())
def _crop_views(
    images: Tensor,
    rows: Tensor | None,
    boxes: Tensor,
    affine: Tensor,
    height: int,
    width: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _run(images, rows, boxes, affine, height, width, dtype, backend)


@_crop_views.register_fake
def _(
    images: Tensor,
    rows: Tensor | None,
    boxes: Tensor,
    affine: Tensor,
    height: int,
    width: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return images.new_empty((len(boxes), height, width, 3), dtype=dtype).permute(0, 3, 1, 2)


def _run(
    images: Tensor,
    rows: Tensor | None,
    boxes: Tensor,
    affine: Tensor,
    height: int,
    width: int,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    size = (height, width)
    check_images(images)
    check_affine(affine, images, dtype)
    _check_size(images, size)
    count = len(images if rows is None else rows)
    _check_boxes(boxes, count, images)
    if rows is not None:
        check_indices(rows, "rows", (rows.numel(),), images.device, len(images))
    name = resolve_views(images, affine, dtype, backend)
    # Deferred: the compiled extension or Triton may be missing.
    if name == "native":
        from kdfast.ops import native

        return native.crop_views(images, rows, boxes, affine, size, dtype)
    if name == "triton":
        from kdfast.ops.views import crops_triton

        return crops_triton.crop_views(images, rows, boxes, affine, size, dtype)
    return crop_views_reference(images, boxes, affine, size=size, rows=rows, dtype=dtype)


def crop_views_reference(
    images: Tensor,
    boxes: Tensor,
    affine: Tensor,
    *,
    size: tuple[int, int],
    rows: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `crop_views` in plain PyTorch, without checks."""
    count, height, width = images.shape[:3]
    if rows is None:
        rows = torch.arange(len(boxes), device=images.device)
    top, left, tall, wide, flip = boxes.long().unbind(1)
    bad = (rows < 0) | (rows >= count) | (flip < 0) | (flip > 1)
    bad |= (top < 0) | (left < 0) | (tall < 1) | (wide < 1) | (top > height - tall) | (left > width - wide)
    rows, top, left, flip = (x.masked_fill(bad, 0) for x in (rows, top, left, flip))
    tall, wide = tall.masked_fill(bad, 1), wide.masked_fill(bad, 1)
    y, down = _taps(tall, height, size[0])
    x, across = _taps(wide, width, size[1])
    half = 1 << (_BITS - 1)
    pixels = torch.zeros((len(boxes), *size, 3), dtype=torch.int32, device=images.device)
    for k in range(y.shape[2]):
        line = torch.zeros_like(pixels)
        at = (rows[:, None, None], (top[:, None] + y[:, :, k])[:, :, None])
        for j in range(x.shape[2]):
            line += images[(*at, (left[:, None] + x[:, :, j])[:, None, :])] * across[:, None, :, j, None]
        pixels += ((line + half) >> _BITS) * down[:, :, k, None, None]
    cropped = ((pixels + half) >> _BITS).to(torch.uint8)
    cropped = torch.where((flip == 1)[:, None, None, None], cropped.flip(2), cropped)
    return normalize(cropped, affine).to(dtype).masked_fill_(bad[:, None, None, None], torch.nan)


def _taps(extents: Tensor, largest: int, size: int) -> tuple[Tensor, Tensor]:
    """Return the pixels that the new ones are made of, and their weights.

    Args:
        extents: `(B,)` int64, the side of each box.
        largest: The side of the images.
        size: The new side.

    Returns:
        int64 `(B, size, taps)`, positions in the box, and int32 of that shape.
    """
    extents = extents[:, None, None]
    reach, center = 2 * extents.clamp(min=size), (2 * torch.arange(size, device=extents.device)[:, None] + 1) * extents
    first = torch.div(center - reach + size, 2 * size, rounding_mode="floor").clamp(min=0)
    place = first + torch.arange(tap_count(largest, size), device=extents.device)
    part = (reach - ((2 * place + 1) * size - center).abs()).clamp(min=0) * (place < extents)
    whole = part.sum(2, keepdim=True)
    weights = torch.div((part << (_BITS + 1)) + whole, 2 * whole, rounding_mode="floor")
    return torch.minimum(place, extents - 1), weights.int()


def tap_count(extent: int, size: int) -> int:
    """Return how many of `extent` pixels at most make one of `size`."""
    return -(-2 * max(extent, size) // size)


def _check_size(images: Tensor, size: tuple[int, int]) -> None:
    for side, new in zip(images.shape[1:3], size, strict=True):
        largest = max(side, new)
        # The numerators' sum differs from 2 m**2 / o by less than o.
        if new < 1 or 2 * largest**2 // new + new >= _MOST or new * largest >= _MOST_PLACE:
            raise ShapeError(
                f"images of {images.shape[1]}x{images.shape[2]} pixels cannot be cropped to {size[0]}x{size[1]}: scale "
                "them to fewer pixels first"
            )


def _check_boxes(boxes: Tensor, count: int, images: Tensor) -> None:
    height, width = images.shape[1:3]
    if boxes.shape != (count, 5) or boxes.dtype != torch.int32 or boxes.device != images.device:
        raise ShapeError(
            f"`boxes` is {boxes.dtype} {tuple(boxes.shape)} on {boxes.device}: pass int32 ({count}, 5) on "
            f"{images.device}, one (top, left, height, width, flip) per sample"
        )
    if boxes.device.type != "cpu":
        return
    top, left, tall, wide, flip = boxes.long().unbind(1)
    bad = (boxes < torch.tensor([0, 0, 1, 1, 0])).any(1) | (top + tall > height) | (left + wide > width) | (flip > 1)
    if bad.any():
        raise ShapeError(
            f"box {tuple(boxes[bad][0].tolist())} does not lie in an image of {height}x{width} pixels: it must be "
            "at least 1x1 and inside, flip in 0..1"
        )
