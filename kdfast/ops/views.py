"""Augmentation as a gather: shifted, flipped or cropped uint8 images to normalised float images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops.backends import resolve
from kdfast.ops.kd_loss.dispatch import plain_eager

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def shift_views(
    images: Tensor,
    moves: Tensor,
    affine: Tensor,
    *,
    pad: int,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Zero-pad each image, cut out a window of its own size, perhaps mirror it, and normalise.

    With `P` the image padded by `pad` black pixels on each side and `(top, left, flip)` the image's move,
    `out[c, y, x] = P[top + y, left + x', c] * scale[c] + bias[c]`, where `x'` is `x`, or `W - 1 - x` when flip is 1;
    rounded after each of the two operations, then to `dtype`. All implementations agree to the bit.

    Args:
        images: `(B, H, W, 3)` uint8, on any device.
        moves: `(B, 3)` int32 on the CPU: top and left in `[0, 2 pad]`, flip in {0, 1}.
        affine: `(2, 3)` float32 or float64, the precision computed in: scale and bias of each channel.
        pad: Width of the black border, in pixels.
        dtype: Floating, of the result.
        backend: "auto", or an implementation's name in the row "views" of `kdfast.ops.backends`.

    Returns:
        `(B, 3, H, W)` in `dtype` and in channels_last memory, on the images' device.

    Raises:
        DataError: The images are not uint8.
        ShapeError: Another shape or dtype is not as above, or a move leaves the padded image.
        BackendUnavailable: A named implementation cannot run here.
    """
    if plain_eager((images,)) and not torch.compiler.is_compiling():
        return _run(images, moves, affine, pad, dtype, backend)
    out: Tensor = _shift_views(images, moves, affine, pad, dtype, backend)
    return out


@torch.library.custom_op("kdfast::shift_views", mutates_args=())
def _shift_views(images: Tensor, moves: Tensor, affine: Tensor, pad: int, dtype: torch.dtype, backend: str) -> Tensor:
    return _run(images, moves, affine, pad, dtype, backend)


def _run(images: Tensor, moves: Tensor, affine: Tensor, pad: int, dtype: torch.dtype, backend: str) -> Tensor:
    check_images(images)
    _check_affine(affine, dtype)
    if moves.shape != (len(images), 3) or moves.dtype != torch.int32 or moves.device.type != "cpu":
        raise ShapeError(
            f"moves are {moves.dtype} {tuple(moves.shape)} on {moves.device}: they must be int32 "
            f"({len(images)}, 3) on the CPU, one (top, left, flip) for each image"
        )
    if len(moves) and (int(moves.min()) < 0 or int(moves[:, :2].max()) > 2 * pad or int(moves[:, 2].max()) > 1):
        raise ShapeError(f"a move leaves the image padded by {pad}: top and left must be in 0..{2 * pad}, flip 0 or 1")
    precision = torch.promote_types(affine.dtype, dtype)
    if backend == "auto" and precision == torch.float64:
        backend = "reference"  # no kernel is meant to serve it: nothing to warn of
    if resolve("views", images.device.type, str(precision).removeprefix("torch."), backend) == "native":
        from kdfast.ops import native

        return native.shift_views(images, moves, affine.cpu(), pad, dtype)
    return shift_views_reference(images, moves, affine, pad=pad, dtype=dtype)


@_shift_views.register_fake
def _(images: Tensor, moves: Tensor, affine: Tensor, pad: int, dtype: torch.dtype, backend: str) -> Tensor:
    return images.new_empty(images.shape, dtype=dtype).permute(0, 3, 1, 2)


def shift_views_reference(
    images: Tensor, moves: Tensor, affine: Tensor, *, pad: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """`shift_views` in plain torch, without its checks."""
    height, width = images.shape[1:3]
    device = images.device
    moves = moves.to(device, non_blocking=True).long()
    padded = F.pad(images, (0, 0, pad, pad, pad, pad))
    columns = torch.arange(width, device=device)
    columns = torch.where(moves[:, 2:] == 1, width - 1 - columns, columns) + moves[:, 1:2]  # (B, W)
    rows = torch.arange(height, device=device) + moves[:, :1]  # (B, H)
    which = torch.arange(len(images), device=device)
    pixels = padded[which[:, None, None], rows[:, :, None], columns[:, None, :]]  # (B, H, W, 3)
    return _normalise(pixels, affine).to(dtype)


def crop_views(
    images: Tensor, boxes: Tensor, affine: Tensor, *, size: tuple[int, int], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Cut a box out of each image, resize it, perhaps mirror it, and normalise.

    The resize is bilinear and antialiased, on the normalised image: as both are linear the order does not matter.

    Args:
        images: `(B, H, W, 3)` uint8, on any device.
        boxes: `(B, 5)` int32 on the CPU: top, left, height, width in pixels, and flip in {0, 1}.
        affine: `(2, 3)` float32 or float64, the precision computed in: scale and bias of each channel.
        size: Height and width of the result.
        dtype: Floating, of the result.

    Returns:
        `(B, 3, h, w)` in `dtype` and in channels_last memory, on the images' device.

    Raises:
        DataError: The images are not uint8.
        ShapeError: Another shape or dtype is not as above, or a box leaves its image.
    """
    check_images(images)
    _check_affine(affine, dtype)
    if boxes.shape != (len(images), 5) or boxes.dtype != torch.int32 or boxes.device.type != "cpu":
        raise ShapeError(
            f"boxes are {boxes.dtype} {tuple(boxes.shape)} on {boxes.device}: they must be int32 "
            f"({len(images)}, 5) on the CPU, one (top, left, height, width, flip) for each image"
        )
    height, width = images.shape[1:3]
    out = torch.empty((len(images), *size, 3), dtype=dtype, device=images.device).permute(0, 3, 1, 2)
    for i, (top, left, tall, wide, flip) in enumerate(boxes.tolist()):
        if min(top, left, flip) < 0 or min(tall, wide) < 1 or top + tall > height or left + wide > width or flip > 1:
            raise ShapeError(f"box {(top, left, tall, wide, flip)} does not lie in an image of {height}x{width} pixels")
        piece = _normalise(images[i : i + 1, top : top + tall, left : left + wide], affine)
        piece = F.interpolate(piece, size=size, mode="bilinear", antialias=True, align_corners=False)
        out[i] = (piece.flip(3) if flip else piece)[0]
    return out


def check_images(images: Tensor) -> None:
    """Raise DataError unless the images are uint8, ShapeError unless they are `(B, H, W, 3)`."""
    if images.dtype != torch.uint8:
        raise DataError(f"images are {images.dtype}: views are made from uint8 pixels; normalisation comes after them")
    if images.dim() != 4 or images.shape[3] != 3:
        raise ShapeError(f"images have shape {tuple(images.shape)}: they must be (B, H, W, 3), channels last")


def _normalise(pixels: Tensor, affine: Tensor) -> Tensor:
    """`(B, H, W, 3)` uint8 pixels to `(B, 3, H, W)` values in the dtype of `affine`, in channels_last memory."""
    affine = affine.to(pixels.device)
    values = pixels.to(affine.dtype) * affine[0] + affine[1]
    return values.permute(0, 3, 1, 2)


def _check_affine(affine: Tensor, dtype: torch.dtype) -> None:
    if affine.shape != (2, 3) or affine.dtype not in (torch.float32, torch.float64):
        raise ShapeError(f"affine is {affine.dtype} {tuple(affine.shape)}: it must be (2, 3), float32 or float64")
    if dtype not in _FLOATS:
        raise ShapeError(f"views of dtype {dtype}: normalised images need one of {_FLOATS}")
