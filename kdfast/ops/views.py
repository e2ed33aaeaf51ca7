"""Augmentation as a gather: shift, flip or crop uint8 images and normalize them to floating point."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops._torch_compat import is_plain_eager
from kdfast.ops.backends import resolve

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shift_views(
    images: Tensor,
    offsets: Tensor,
    affine: Tensor,
    *,
    pad: int,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Zero-pad each image, crop a window of the original size, optionally mirror it, and normalize.

    With `P` the image padded by `pad` black pixels on each side and `(top, left, flip)` the image's move,
    `out[c, y, x] = P[top + y, left + x', c] * scale[c] + bias[c]`, where `x'` is `W - 1 - x` if flip is 1 and `x`
    otherwise. Each of the two operations is rounded, then the result is rounded to `dtype`. All implementations are
    bit-equal.

    Args:
        images: `(B, H, W, 3)` uint8, on any device.
        offsets: `(B, 3)` int32 on the CPU: top and left in `[0, 2 pad]`, flip in {0, 1}.
        affine: `(2, 3)`: scale and bias of each channel, in float32 or float64, which is the precision of the
            computation.
        pad: Width of the black border, in pixels.
        dtype: Floating-point dtype of the result.
        backend: "auto", or the name of an implementation in the row "views" of `kdfast.ops.backends`.

    Returns:
        `(B, 3, H, W)` in `dtype` and channels_last memory format, on the device of the images.

    Raises:
        DataError: If the images are not uint8.
        ShapeError: If another shape or dtype is not as above, or an offset leaves the padded image.
        BackendUnavailable: If a named implementation cannot run here.
    """
    if is_plain_eager((images,)) and not torch.compiler.is_compiling():
        return _run(images, offsets, affine, pad, dtype, backend)
    out: Tensor = _shift_views(images, offsets, affine, pad, dtype, backend)
    return out


@torch.library.custom_op("kdfast::shift_views", mutates_args=())
def _shift_views(images: Tensor, offsets: Tensor, affine: Tensor, pad: int, dtype: torch.dtype, backend: str) -> Tensor:
    return _run(images, offsets, affine, pad, dtype, backend)


def _run(images: Tensor, offsets: Tensor, affine: Tensor, pad: int, dtype: torch.dtype, backend: str) -> Tensor:
    check_images(images)
    _check_affine(affine, dtype)
    if offsets.shape != (len(images), 3) or offsets.dtype != torch.int32 or offsets.device.type != "cpu":
        raise ShapeError(
            f"`offsets` is {offsets.dtype} {tuple(offsets.shape)} on {offsets.device}: pass int32 ({len(images)}, 3) "
            "on the CPU, one (top, left, flip) per image"
        )
    if len(offsets) and (int(offsets.min()) < 0 or int(offsets[:, :2].max()) > 2 * pad or int(offsets[:, 2].max()) > 1):
        raise ShapeError(
            f"an offset leaves the image padded by {pad}: top and left must be in 0..{2 * pad}, flip in 0..1"
        )
    precision = torch.promote_types(affine.dtype, dtype)
    if backend == "auto" and precision == torch.float64:
        backend = "reference"  # no kernel supports float64 by design, so resolve must not warn
    if resolve("views", images.device.type, str(precision).removeprefix("torch."), backend) == "native":
        # Deferred: the compiled extension may be missing.
        from kdfast.ops import native

        return native.shift_views(images, offsets, affine.cpu(), pad, dtype)
    return shift_views_reference(images, offsets, affine, pad=pad, dtype=dtype)


@_shift_views.register_fake
def _(images: Tensor, offsets: Tensor, affine: Tensor, pad: int, dtype: torch.dtype, backend: str) -> Tensor:
    return images.new_empty(images.shape, dtype=dtype).permute(0, 3, 1, 2)


def shift_views_reference(
    images: Tensor, offsets: Tensor, affine: Tensor, *, pad: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute `shift_views` in plain PyTorch, without checks."""
    height, width = images.shape[1:3]
    device = images.device
    offsets = offsets.to(device, non_blocking=True).long()
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    columns = torch.arange(width, device=device)
    columns = torch.where(offsets[:, 2:] == 1, width - 1 - columns, columns) + offsets[:, 1:2]  # (B, W)
    rows = torch.arange(height, device=device) + offsets[:, :1]  # (B, H)
    batch = torch.arange(len(images), device=device)
    pixels = padded[batch[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return _normalize(pixels, affine).to(dtype)


def crop_views(
    images: Tensor, boxes: Tensor, affine: Tensor, *, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Crop a box from each image, resize it, optionally mirror it, and normalize.

    The resize is bilinear and antialiased and follows the normalization; both are linear, so their order does not
    matter.

    Args:
        images: `(B, H, W, 3)` uint8, on any device.
        boxes: `(B, 5)` int32 on the CPU: top, left, height, width in pixels, and flip in {0, 1}.
        affine: As for `shift_views`.
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
