"""Faster decoders of JPEG files than Pillow's, where they are installed and give Pillow's pixels.

The fingerprint of a data set is that of its decoded pixels, so the decoder must not matter. A decoder is used only if
it decodes a few probes, of every subsampling of the colors and of odd sizes, to Pillow's pixels. Otherwise, and for
files that it refuses, Pillow decodes.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, NamedTuple

import numpy as np

from kdfast.data.source import Pixels

Decode = Callable[[bytes], Any]

_SIDES = ((24, 40), (17, 31), (8, 9))
_SUBSAMPLINGS = (0, 1, 2)  # Pillow's numbers of 4:4:4, 4:2:2 and 4:2:0
_HALF_WIDTH = 1
_FRAMES = (0xC0, 0xC2)  # markers of a baseline and a progressive image


class JpegDecoder(NamedTuple):
    """A decoder.

    Attributes:
        name: Its package and version.
        decode: Returns the pixels of a file, uint8 (H, W, 3); raises what it likes if it cannot.
    """

    name: str
    decode: Callable[[bytes], Pixels]


def _simplejpeg() -> Decode:
    from simplejpeg import decode_jpeg

    return functools.partial(decode_jpeg, colorspace="RGB")


def _torchvision() -> Decode:
    import torch
    from torchvision.io import ImageReadMode, decode_jpeg

    def decode(data: bytes) -> Any:
        content = torch.from_numpy(np.frombuffer(bytearray(data), np.uint8))
        return decode_jpeg(content, mode=ImageReadMode.RGB).permute(1, 2, 0).contiguous().numpy()

    return decode


DECODERS: dict[str, Callable[[], Decode]] = {"simplejpeg": _simplejpeg, "torchvision": _torchvision}
"""Package -> function that imports it and returns its decoder; the first that fits is used."""


@functools.cache
def fast_decoder() -> JpegDecoder | None:
    """Return the first installed decoder that gives Pillow's pixels, or None."""
    for package, load in DECODERS.items():
        try:
            decode = load()
            if all(np.array_equal(decode(data), pixels) for data, pixels in _probes()):
                return JpegDecoder(f"{package} {version(package)}", decode)
        except Exception:  # a package that is missing or broken in any way
            continue
    return None


@functools.cache
def _probes() -> list[tuple[bytes, Pixels]]:
    """Return JPEG files and the pixels that Pillow decodes them to."""
    from PIL import Image

    generator, probes = np.random.default_rng(0), []
    for height, width in _SIDES:
        smooth = generator.integers(0, 256, (3, 3, 3), dtype=np.uint8)
        image = Image.fromarray(smooth).resize((width, height), Image.Resampling.BICUBIC)
        noisy = Image.blend(image, Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)), 0.3)
        kinds = [(noisy, {"subsampling": s, "progressive": p}) for s in _SUBSAMPLINGS for p in (False, True)]
        for picture, options in [*kinds, (noisy.convert("L"), {})]:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=80, **options)
            found = file.getvalue()
            for data in (found, _turned(found)) if options.get("subsampling") == _HALF_WIDTH else (found,):
                with Image.open(io.BytesIO(data)) as opened:
                    probes.append((data, np.asarray(opened.convert("RGB"))))
    return probes


def _turned(data: bytes) -> bytes:
    """Return a JPEG file of 4:2:2 as one of 4:4:0, as of turned photos, with the same blocks in other places."""
    changed, at = bytearray(data), 2
    while changed[at + 1] not in _FRAMES:
        at += 2 + int.from_bytes(changed[at + 2 : at + 4], "big")
    sides = slice(at + 5, at + 9)  # height and width
    changed[sides] = changed[at + 7 : at + 9] + changed[at + 5 : at + 7]
    changed[at + 11] = 0x12  # 1 x 2 blocks of the first channel for one of the others
    return bytes(changed)
