"""Turn one image of any common type into uint8 RGB pixels, and refuse what would lose values without a word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kdfast.data.source import Pixels
from kdfast.errors import DataError

Array = npt.NDArray[Any]
ValueRange = tuple[float, float]

# Pillow's modes with 8 bits per channel or fewer. Others, such as I;16 and F, would be clipped by its conversions.
_EIGHT_BIT_MODES = ("1", "L", "P", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV", "LA", "La", "PA")
_ACCEPTED = "pass uint8 (H, W, 3), a PIL image, or a tensor (3, H, W)"
_TELL_RANGE = "pass `value_range`, the values of black and white, or images of 8 bits per channel"


def to_pixels(image: Any, where: str, value_range: ValueRange | None) -> Pixels:
    """Return one image as uint8 `(H, W, 3)`.

    Args:
        image: A PIL image, an array `(H, W)` or `(H, W, 1 or 3)`, or a tensor `(1 or 3, H, W)` or `(H, W)`.
        where: Name of the sample in messages.
        value_range: Values of black and white in images that are not uint8, which are scaled to 0 to 255 and rounded;
            None: float tensors must equal a uint8 image / 255, and other types are refused.

    Raises:
        DataError: The image has another type or shape, or values outside of the range.
    """
    if isinstance(image, (Mapping, bytes, str)) or image is None:
        kind = type(image).__name__
        raise DataError(f"{where} has an image of type {kind}, which is not decoded: {_ACCEPTED}")
    array = _to_array(image, where, value_range)
    if array.dtype != np.uint8 and value_range is not None and array.dtype.kind in "biuf":
        array = _scale(array, where, value_range)
    if array.ndim == 2:
        array = array[..., np.newaxis]
    if array.dtype != np.uint8 and array.dtype.kind in "biuf" and array.size:
        low, high = array.min(), array.max()
        raise DataError(f"{where} is {array.dtype} of shape {array.shape}, values {low} to {high}: {_TELL_RANGE}")
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] not in (1, 3):
        raise DataError(f"{where} is {array.dtype} of shape {array.shape}: {_ACCEPTED}")
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)), dtype=np.uint8)


def _to_array(image: Any, where: str, value_range: ValueRange | None) -> Array:
    """Return the values of an image, with the channels last."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        if image.is_floating_point():
            image = image.double() if value_range is not None else _unscale(image, where)
        return np.asarray((image.movedim(0, -1) if image.ndim == 3 else image).numpy())
    if hasattr(image, "convert"):  # a PIL image; importing PIL would be slow
        return np.asarray(image.convert("RGB") if image.mode in _EIGHT_BIT_MODES else image)
    return np.asarray(image)


def _unscale(image: torch.Tensor, where: str) -> torch.Tensor:
    """Return the uint8 image that a float tensor is, divided by 255."""
    scaled = image.double() * 255
    image = scaled.round()
    # False for NaN too.
    if not bool(((scaled - image).abs() < 1e-3).all() and (image >= 0).all() and (image <= 255).all()):
        raise DataError(
            f"{where} is a float tensor that is not a uint8 image / 255: pass it before normalization, or `value_range`"
        )
    return image.to(torch.uint8)


def _scale(array: Array, where: str, value_range: ValueRange) -> Pixels:
    low, high = value_range
    values = array.astype(np.float64)
    # False for NaN too.
    if not ((values >= low) & (values <= high)).all():
        raise DataError(
            f"{where} has values from {values.min():g} to {values.max():g}, outside of {low:g} to {high:g}: pass a "
            "`value_range` that holds for all images"
        )
    return np.rint((values - low) * (255 / (high - low))).astype(np.uint8)
