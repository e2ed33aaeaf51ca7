"""Rotation, shear and translation of uint8 images to the nearest pixel, with the bits of Pillow's; outside is black.

All take `(n, H, W, 3)` uint8 images and a float64 `(n,)` on the same device, and return new images.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_DIGITS = 15  # to which Pillow rounds sine and cosine
_ONE = 1 << 16  # positions are in units of 1/65536 pixel


def rotate(images: Tensor, values: Tensor) -> Tensor:
    """Rotate by degrees around the center, counterclockwise."""
    height, width = images.shape[1:3]
    rows = []
    for degrees in values.tolist():
        angle = -math.radians(degrees % 360)
        cos, sin = round(math.cos(angle), _DIGITS), round(math.sin(angle), _DIGITS)
        minus = round(-math.sin(angle), _DIGITS)
        x, y = width / 2, height / 2
        rows.append((cos, sin, cos * -x + sin * -y + x, minus, cos, minus * -x + cos * -y + y))
    return _transform(images, torch.tensor(rows, dtype=torch.float64, device=images.device).view(-1, 6))


def shear_x(images: Tensor, values: Tensor) -> Tensor:
    """Shift each row by its distance from the top times a factor."""
    return _transform(images, _identity_with(values, 1))


def shear_y(images: Tensor, values: Tensor) -> Tensor:
    """Shift each column by its distance from the left times a factor."""
    return _transform(images, _identity_with(values, 3))


def translate_x(images: Tensor, values: Tensor) -> Tensor:
    """Shift by pixels to the left."""
    return _transform(images, _identity_with(values, 2))


def translate_y(images: Tensor, values: Tensor) -> Tensor:
    """Shift by pixels upwards."""
    return _transform(images, _identity_with(values, 5))


def _identity_with(values: Tensor, position: int) -> Tensor:
    """Return `(n, 6)` identity transforms with one coefficient replaced."""
    rows = values.new_tensor([1.0, 0, 0, 0, 1.0, 0]).repeat(len(values), 1)
    rows[:, position] = values
    return rows


def _transform(images: Tensor, coefficients: Tensor) -> Tensor:
    """Fill pixel (x, y) with that at (a x + b y + c, d x + e y + f), from the centers of pixels, in fixed point.

    Args:
        images: uint8 `(n, H, W, 3)`.
        coefficients: float64 `(n, 6)`: a, b, c, d, e, f.
    """
    count, height, width, _ = images.shape
    x = torch.arange(width, device=images.device)
    y = torch.arange(height, device=images.device)[:, None]

    def positions(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        fixed = [(v * _ONE + 0.5).floor().long().view(-1, 1, 1) for v in (a, b, c + a * 0.5 + b * 0.5)]
        return (fixed[2] + x * fixed[0] + y * fixed[1]) >> 16

    a, b, c, d, e, f = coefficients.unbind(1)
    from_x, from_y = positions(a, b, c), positions(d, e, f)
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    index = from_y.clamp(0, height - 1) * width + from_x.clamp(0, width - 1)
    flat = images.reshape(count, height * width, 3)
    moved = flat.gather(1, index.view(count, -1, 1).expand(-1, -1, 3)).view_as(images)
    return moved * inside[..., None]
