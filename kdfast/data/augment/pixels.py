"""Operations on the pixel values of uint8 images, one parameter for each image, with the bits of Pillow's.

All take `(n, H, W, 3)` uint8 images and a float64 `(n,)` on the same device, and return new images.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEVELS = 256
# Weights of red, green and blue in the luma of ITU-R 601, in 2**-16, as Pillow rounds them.
_LUMA = (19595, 38470, 7471)


def autocontrast(images: Tensor, values: Tensor) -> Tensor:
    """Stretch each channel so that its smallest value becomes 0 and its largest 255; the parameter has no effect."""
    flat = images.flatten(1, 2).double()
    low, high = flat.amin(1)[:, None], flat.amax(1)[:, None]  # (n, 1, 3)
    # A number divided by a tensor would be its reciprocal, rounded, times the number.
    scale = torch.full_like(low, 255.0) / (high - low).clamp(min=1)
    levels = torch.arange(_LEVELS, dtype=torch.float64, device=images.device)[None, :, None]
    table = (levels * scale + -low * scale).clamp(0, 255).to(torch.uint8)
    return _look_up(images, torch.where(high > low, table, levels.to(torch.uint8)))


def equalize(images: Tensor, values: Tensor) -> Tensor:
    """Make the histogram of each channel as uniform as its levels allow; the parameter has no effect."""
    pixels = images.flatten(1, 2).long()
    counts = torch.zeros(len(images), _LEVELS, 3, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, pixels, torch.ones_like(pixels))
    levels = torch.arange(_LEVELS, device=images.device)[None, :, None]
    last = torch.where(counts > 0, levels, -1).amax(1, keepdim=True)
    step = (pixels.shape[1] - counts.gather(1, last)) // 255
    below = counts.cumsum(1) - counts
    table = ((step // 2 + below) // step.clamp(min=1)).clamp(max=255)
    return _look_up(images, torch.where(step > 0, table, levels).to(torch.uint8))


def solarize(images: Tensor, values: Tensor) -> Tensor:
    """Invert the values from a threshold in 0..256 on."""
    return torch.where(images < values.view(-1, 1, 1, 1), images, 255 - images)


def posterize(images: Tensor, values: Tensor) -> Tensor:
    """Keep the upper 1..8 bits of each value."""
    dropped = (1 << (8 - values.long())) - 1
    return images & (255 - dropped).to(torch.uint8).view(-1, 1, 1, 1)


def color(images: Tensor, values: Tensor) -> Tensor:
    """Blend with the gray image: 0 is gray, 1 the image, more is more colorful."""
    return _blend(_luma(images)[..., None], images, values)


def contrast(images: Tensor, values: Tensor) -> Tensor:
    """Blend with the mean gray of the image: 0 is that gray, 1 the image, more has more contrast."""
    luma = _luma(images).flatten(1)
    mean = (luma.sum(1).double() / luma.shape[1] + 0.5).long()
    return _blend(mean.view(-1, 1, 1, 1), images, values)


def brightness(images: Tensor, values: Tensor) -> Tensor:
    """Blend with black: 0 is black, 1 the image, more is brighter."""
    return _blend(torch.zeros_like(images[:, :1, :1, :1]).long(), images, values)


def sharpness(images: Tensor, values: Tensor) -> Tensor:
    """Blend with a smoothed image: 0 is smooth, 1 the image, more is sharper. The border is not smoothed."""
    pixels = images.long()
    smooth = pixels.clone()
    if min(images.shape[1:3]) > 2:
        height, width = images.shape[1] - 2, images.shape[2] - 2
        total = 4 * pixels[:, 1:-1, 1:-1]
        for y in range(3):
            for x in range(3):
                total = total + pixels[:, y : y + height, x : x + width]
        smooth[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # the mean with weights of 1, and 5 in the middle
    return _blend(smooth, images, values)


def _blend(start: Tensor, images: Tensor, factors: Tensor) -> Tensor:
    """Return `start + factor * (images - start)`, cut to 0..255 and rounded towards 0, in float32 as Pillow does."""
    factor = factors.float().view(-1, 1, 1, 1)
    values = start.float() + factor * (images.long() - start).float()
    return values.clamp(0, 255).to(torch.uint8)


def _luma(images: Tensor) -> Tensor:
    """Return the gray value of each pixel, int64 `(n, H, W)`."""
    red, green, blue = images.long().unbind(3)
    return (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + (1 << 15)) >> 16


def _look_up(images: Tensor, table: Tensor) -> Tensor:
    """Replace each value by its entry in the tables, uint8 `(n, 256, 3)`."""
    return table.gather(1, images.flatten(1, 2).long()).view_as(images)
