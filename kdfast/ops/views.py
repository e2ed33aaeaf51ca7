"""Augmentation as a gather: shift, flip or crop uint8 images and normalize them to floating point."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops._torch_compat import is_plain_eager
from kdfast.ops.backends import resolve

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def gather_views(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    *,
    pad: int,
    flip: bool,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Zero-pad the image of each sample, crop a window of the original size, optionally mirror it, and normalize.

    A view id is `(top * (2 pad + 1) + left) * flips + mirrored`, with `top` and `left` in `[0, 2 pad]` and with 2
    `flips` if `flip` is true, else 1. With `P` the image padded by `pad` black pixels on each side,
    `out[i, c, y, x] = P[top + y, left + x', c] * scale[c] + bias[c]`, where `x'` is `W - 1 - x` if mirrored and `x`
    otherwise. Each of the two operations is rounded, then the result is rounded to `dtype`. All implementations are
    bit-equal.

    On a GPU nothing is copied to the host or waited for. There a row or view id out of range cannot raise an error:
    the sample becomes NaN.

    Args:
        images: `(N, H, W, 3)` uint8, contiguous, on any device: a batch, or the data set that `rows` selects from.
        rows: `(B,)` int64 on the images' device: the image of each sample, in `[0, N)`. None: sample i has image i,
            and B = N.
        view_ids: `(B,)` int64 on the images' device.
        affine: `(2, 3)` on the images' device: scale and bias of each channel, in float32 or float64, which is the
            precision of the computation.
        pad: Width of the black border, in pixels.
        flip: Whether the views include mirrored ones.
        dtype: Floating-point dtype of the result.
        backend: "auto", or the name of an implementation in the row "views" of `kdfast.ops.backends`.

    Returns:
        `(B, 3, H, W)` in `dtype` and channels_last memory format, on the device of the images.

    Raises:
        DataError: If the images are not uint8.
        ShapeError: If another shape, dtype or device is not as above, or a row or view id is out of range on a CPU.
        BackendUnavailable: If a named implementation cannot run here.
    """
    if not torch.compiler.is_compiling() and is_plain_eager((images, rows, view_ids, affine)):
        return _run(images, rows, view_ids, affine, pad, flip, dtype, backend)
    out: Tensor = _gather_views(images, rows, view_ids, affine, pad, flip, dtype, backend)
    return out


@torch.library.custom_op("kdfast::gather_views", mutates_args=())
def _gather_views(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    pad: int,
    flip: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return _run(images, rows, view_ids, affine, pad, flip, dtype, backend)


@_gather_views.register_fake
def _(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    pad: int,
    flip: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return images.new_empty((len(view_ids), *images.shape[1:]), dtype=dtype).permute(0, 3, 1, 2)


def _run(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    pad: int,
    flip: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    check_images(images)
    _check_affine(affine, dtype)
    if affine.device != images.device:
        raise ShapeError(f"`affine` is on {affine.device}, the images on {images.device}: put both on one device")
    batch = images if rows is None else rows
    _check_indices(view_ids, "view_ids", (len(batch),), images.device, _view_count(pad, flip))
    if rows is not None:
        _check_indices(rows, "rows", (rows.numel(),), images.device, len(images))
    precision = torch.promote_types(affine.dtype, dtype)
    if backend == "auto" and precision == torch.float64:
        backend = "reference"  # no kernel supports float64 by design, so resolve must not warn
    name = resolve("views", images.device.type, str(precision).removeprefix("torch."), backend)
    # Deferred: the compiled extension or Triton may be missing.
    if name == "native":
        from kdfast.ops import native

        return native.gather_views(images, rows, view_ids, affine, pad, flip, dtype)
    if name == "triton":
        from kdfast.ops import views_triton

        return views_triton.gather_views(images, rows, view_ids, affine, pad, flip, dtype)
    return gather_views_reference(images, rows, view_ids, affine, pad=pad, flip=flip, dtype=dtype)


def gather_views_reference(
    images: Tensor,
    rows: Tensor | None,
    view_ids: Tensor,
    affine: Tensor,
    *,
    pad: int,
    flip: bool,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Compute `gather_views` in plain PyTorch, without checks."""
    count, height, width = images.shape[:3]
    device, flips, side = images.device, 2 if flip else 1, 2 * pad + 1
    if rows is None:
        rows = torch.arange(len(view_ids), device=device)
    bad = (rows < 0) | (rows >= count) | (view_ids < 0) | (view_ids >= _view_count(pad, flip))
    rows, view_ids = rows.masked_fill(bad, 0), view_ids.masked_fill(bad, 0)
    shifts, mirrored = view_ids // flips, view_ids % flips == 1
    x = torch.arange(width, device=device)
    x = torch.where(mirrored[:, None], width - 1 - x, x) + (shifts % side - pad)[:, None]  # (B, W)
    y = torch.arange(height, device=device) + (shifts // side - pad)[:, None]  # (B, H)
    inside = ((y >= 0) & (y < height))[:, :, None] & ((x >= 0) & (x < width))[:, None, :]
    x, y = x.clamp(0, width - 1), y.clamp(0, height - 1)
    pixels = images[rows[:, None, None], y[:, :, None], x[:, None, :]] * inside[..., None]  # (B, H, W, 3)
    values = _normalize(pixels, affine).to(dtype)
    return values.masked_fill_(bad[:, None, None, None], torch.nan)


def crop_views(
    images: Tensor, boxes: Tensor, affine: Tensor, *, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Crop a box from each image, resize it, optionally mirror it, and normalize.

    The resize is bilinear and antialiased and follows the normalization; both are linear, so their order does not
    matter.

    Args:
        images: `(B, H, W, 3)` uint8, on any device.
        boxes: `(B, 5)` int32 on the CPU: top, left, height, width in pixels, and flip in {0, 1}.
        affine: As for `gather_views`, on any device.
        size: Height and width of the result.
        dtype: Floating-point dtype of the result.

    Returns:
        `(B, 3, h, w)` in `dtype` and channels_last memory format, on the device of the images.

    Raises:
        DataError: If the images are not uint8.
        ShapeError: If another shape or dtype is not as above, or a box leaves its image.
    """
    check_images(images)
    _check_affine(affine, dtype)
    if boxes.shape != (len(images), 5) or boxes.dtype != torch.int32 or boxes.device.type != "cpu":
        raise ShapeError(
            f"`boxes` is {boxes.dtype} {tuple(boxes.shape)} on {boxes.device}: pass int32 ({len(images)}, 5) on the "
            "CPU, one (top, left, height, width, flip) per image"
        )
    height, width = images.shape[1:3]
    out = torch.empty((len(images), *size, 3), dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    for i, (top, left, tall, wide, flip) in enumerate(boxes.tolist()):
        if min(top, left, flip) < 0 or min(tall, wide) < 1 or top + tall > height or left + wide > width or flip > 1:
            raise ShapeError(
                f"box {(top, left, tall, wide, flip)} does not lie in an image of {height}x{width} pixels: it must be "
                "at least 1x1 and inside, flip in 0..1"
            )
        piece = _normalize(images[i : i + 1, top : top + tall, left : left + wide], affine)
        piece = F.interpolate(piece, size=size, mode="bilinear", antialias=True, align_corners=False)
        out[i] = (piece.flip(3) if flip else piece)[0]
    return out


def check_images(images: Tensor) -> None:
    """Raise DataError unless the images are uint8 and ShapeError unless they are `(B, H, W, 3)`."""
    if images.dtype != torch.uint8:
        raise DataError(f"`images` has dtype {images.dtype}: pass uint8 pixels, before any normalization")
    if images.dim() != 4 or images.shape[3] != 3:
        raise ShapeError(f"`images` has shape {tuple(images.shape)}: pass (B, H, W, 3), channels last")


def _view_count(pad: int, flip: bool) -> int:
    return (2 * pad + 1) ** 2 * (2 if flip else 1)


def _check_indices(indices: Tensor, name: str, shape: tuple[int], device: torch.device, limit: int) -> None:
    """Raise a ShapeError unless `indices` is int64 of this shape on this device and, on a CPU, in `[0, limit)`."""
    if indices.shape != shape or indices.dtype != torch.int64 or indices.device != device:
        raise ShapeError(
            f"`{name}` is {indices.dtype} {tuple(indices.shape)} on {indices.device}: pass int64 {shape} on {device}, "
            "one for each sample"
        )
    if limit == 0 and len(indices):
        raise ShapeError(f"`images` is empty, but there are {len(indices)} `{name}`: pass at least one image")
    if device.type == "cpu" and len(indices):
        low, high = (int(x) for x in torch.aminmax(indices))
        if low < 0 or high >= limit:
            raise ShapeError(f"`{name}` go from {low} to {high}: must be 0 to {limit - 1}")


def _normalize(pixels: Tensor, affine: Tensor) -> Tensor:
    """Normalize `(B, H, W, 3)` uint8 pixels to `(B, 3, H, W)` in the dtype of `affine`, channels_last."""
    affine = affine.to(pixels.device)
    values = pixels.to(affine.dtype) * affine[0] + affine[1]
    return values.permute(0, 3, 1, 2)


def _check_affine(affine: Tensor, dtype: torch.dtype) -> None:
    if affine.shape != (2, 3) or affine.dtype not in (torch.float32, torch.float64):
        raise ShapeError(f"`affine` is {affine.dtype} {tuple(affine.shape)}: pass (2, 3) in float32 or float64")
    if dtype not in _FLOATS:
        raise ShapeError(f"`dtype` is {dtype}: choose one of {', '.join(str(x) for x in _FLOATS)}")
