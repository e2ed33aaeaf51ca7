"""What the operators on views require of their arguments, and the choice of backend and normalization they share."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import DataError, ShapeError
from kdfast.ops.backends import resolve

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_images(images: Tensor) -> None:
    """Raise DataError unless the images are uint8 and ShapeError unless they are `(B, H, W, 3)`."""
    if images.dtype != torch.uint8:
        raise DataError(f"`images` has dtype {images.dtype}: pass uint8 pixels, before any normalization")
    if images.dim() != 4 or images.shape[3] != 3:
        raise ShapeError(f"`images` has shape {tuple(images.shape)}: pass (B, H, W, 3), channels last")


def check_affine(affine: Tensor, images: Tensor, dtype: torch.dtype) -> None:
    """Raise a ShapeError unless `affine` is (2, 3) in float32 or float64 on the images' device, and `dtype` a float."""
    if affine.shape != (2, 3) or affine.dtype not in (torch.float32, torch.float64):
        raise ShapeError(f"`affine` is {affine.dtype} {tuple(affine.shape)}: pass (2, 3) in float32 or float64")
    if dtype not in _FLOATS:
        raise ShapeError(f"`dtype` is {dtype}: choose one of {', '.join(str(x) for x in _FLOATS)}")
    if affine.device != images.device:
        raise ShapeError(f"`affine` is on {affine.device}, the images on {images.device}: put both on one device")


def check_indices(indices: Tensor, name: str, shape: tuple[int], device: torch.device, limit: int) -> None:
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


def resolve_views(images: Tensor, affine: Tensor, dtype: torch.dtype, backend: str) -> str:
    """Return the name of the implementation that a call runs, see `kdfast.ops.backends.resolve`."""
    precision = torch.promote_types(affine.dtype, dtype)
    if backend == "auto" and precision == torch.float64:
        backend = "reference"  # no kernel supports float64 by design, so resolve must not warn
    return resolve("views", images.device.type, str(precision).removeprefix("torch."), backend)


def normalize(pixels: Tensor, affine: Tensor) -> Tensor:
    """Normalize `(B, H, W, 3)` uint8 pixels to `(B, 3, H, W)` in the dtype of `affine`, channels_last."""
    values = pixels.to(affine.dtype) * affine[0] + affine[1]
    return values.permute(0, 3, 1, 2)
