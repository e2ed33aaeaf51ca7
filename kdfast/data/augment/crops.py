"""Boxes of random resized crops, the same on every machine: only correctly rounded operations, no exp or pow."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import WordArray, hash64, uniform, uniform_below

_ATTEMPTS = 10
_RATIO_BITS = 16


def crop_boxes(
    keys: WordArray,
    image_size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip: bool,
    whole: npt.NDArray[np.bool_],
) -> npt.NDArray[np.int32]:
    """Draw a box for each key: area uniform in `scale`, width / height log-uniform in `ratio`, position uniform.

    A shape that does not fit the image is drawn again. After ten attempts the box is the whole image.

    Args:
        keys: `(n,)` uint64, one for each (seed, sample, view).
        image_size: Height and width of the images, in pixels.
        scale: Smallest and largest area of a box, as a fraction of the image's.
        ratio: Smallest and largest width / height of a box.
        flip: Whether to mirror half of the boxes.
        whole: `(n,)`, true where the box is the whole image, not mirrored.

    Returns:
        `(n, 5)` int32: top, left, height, width in pixels, and flip in {0, 1}.
    """
    tall, wide = image_size
    height, width = np.full(len(keys), tall, np.int64), np.full(len(keys), wide, np.int64)
    pending = ~whole
    for attempt in range(_ATTEMPTS):
        area = tall * wide * (scale[0] + (scale[1] - scale[0]) * uniform(hash64(keys, attempt, 0)))
        aspect = ratio[0] * _power(ratio[1] / ratio[0], hash64(keys, attempt, 1))
        h, w = (np.maximum(1, np.rint(np.sqrt(x))).astype(np.int64) for x in (area / aspect, area * aspect))
        fits = pending & (h <= tall) & (w <= wide)
        height[fits], width[fits] = h[fits], w[fits]
        pending &= ~fits
    top = uniform_below(hash64(keys, _ATTEMPTS, 0), tall - height + 1)
    left = uniform_below(hash64(keys, _ATTEMPTS, 1), wide - width + 1)
    mirrored = uniform_below(hash64(keys, _ATTEMPTS, 2), 2) * (~whole if flip else 0)
    return np.stack([top, left, height, width, mirrored], axis=1).astype(np.int32)


def _power(base: float, words: WordArray) -> npt.NDArray[np.float64]:
    """Return `base ** u` for `u` uniform on the multiples of 2**-16 in [0, 1), a product of square roots."""
    out, root = np.ones(len(words)), np.float64(base)
    for bit in range(1, _RATIO_BITS + 1):
        root = np.sqrt(root)
        out *= np.where(words >> np.uint64(64 - bit) & np.uint64(1), root, 1.0)
    return out
