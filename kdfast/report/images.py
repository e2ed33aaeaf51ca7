"""Data set images embedded in a page as PNG data URIs."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt
from PIL import Image

# Pixels of the longer side. Larger images would only make the page heavy.
_MAX_SIDE = 128


def encode_data_uri(pixels: npt.NDArray[np.uint8]) -> str:
    """Encode uint8 (H, W, 3) pixels as a PNG data URI, scaled down to at most 128 pixels per side."""
    image = Image.fromarray(pixels)
    if max(image.size) > _MAX_SIDE:
        image.thumbnail((_MAX_SIDE, _MAX_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
