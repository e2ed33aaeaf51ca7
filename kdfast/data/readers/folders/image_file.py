"""Decode one image file that someone else made: common formats only, and no more pixels than a limit.

Pillow opens many formats by their content, whatever the name; some run other programs (EPS: Ghostscript) or have
decoders that few people test. Here only the formats in `FORMATS` are tried.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from kdfast.data.readers.folders.jpeg import fast_decoder
from kdfast.errors import DataError
from kdfast.files.inputs import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

# Pillow's names of the formats; `<Name>ImagePlugin` is the module of each.
FORMATS = ("Jpeg", "Png", "WebP", "Bmp", "Gif", "Tiff", "Ppm", "Mpo", "Avif")

SUFFIXES = (".avif", ".bmp", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Ends of the names of image files, in lower case."""

_DEEP_MODES = ("I", "F")


@dataclass(frozen=True)
class Encoded:
    """An image file inside another file, such as an archive or a table.

    Attributes:
        name: Its name, for messages.
        read: Returns its bytes; may raise OSError.
    """

    name: str
    read: Callable[[], bytes | memoryview]

    def __str__(self) -> str:
        return self.name


def is_image_name(name: str) -> bool:
    """Return whether a file name ends like that of an image."""
    return name.lower().endswith(SUFFIXES)


@contextlib.contextmanager
def opened_image(file: str | Encoded) -> Iterator[Image]:
    """Yield the image in a file, its pixels not yet decoded; turn all errors into one that names the file.

    Raises:
        DataError: The file cannot be read, is no regular file, is not in one of `FORMATS`, is damaged, has too many
            pixels, or has more than 8 bits per channel.
    """
    from PIL import Image, UnidentifiedImageError  # slow to import

    bombs = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with _open(file) as stream, Image.open(stream, formats=_installed_formats()) as image:
            limit = min(MAX_IMAGE_PIXELS, Image.MAX_IMAGE_PIXELS or math.inf)
            if image.width * image.height > limit:
                raise ValueError(f"its {image.width} x {image.height} pixels exceed the limit of {limit}")
            if image.mode.startswith(_DEEP_MODES):
                raise ValueError(f"its pixels are {image.mode}, not 8 bits per channel; scale them to 0 to 255")
            yield image
    except UnidentifiedImageError as error:
        formats = ", ".join(_installed_formats())
        raise DataError(
            f"{file} cannot be read as an image (it is not {formats}): replace or remove it, or install a Pillow that "
            "reads it"
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, struct.error, *bombs) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{file} cannot be read as an image ({reason}): replace or remove it") from error


def _open(file: str | Encoded) -> BinaryIO:
    return io.BytesIO(file.read()) if isinstance(file, Encoded) else open_regular(file, MAX_IMAGE_BYTES)


@functools.lru_cache
def _installed_formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that the installed Pillow reads; WebP and AVIF depend on how it was built."""
    from PIL import Image

    for name in FORMATS:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"PIL.{name}ImagePlugin")
    return tuple(name.upper() for name in FORMATS if name.upper() in Image.OPEN)


def decode_rgb(image: Image) -> Image:
    """Decode an image that `opened_image` yields to the colors red, green and blue.

    JPEG files are decoded by the faster decoder where there is one, see `kdfast.data.readers.folders.jpeg`.

    Raises:
        OSError, ValueError: It is damaged.
    """
    fast = fast_decoder() if image.format == "JPEG" and image.mode in ("RGB", "L") else None
    if fast is not None:
        from PIL import Image as pillow

        stream = image.fp  # type: ignore[attr-defined]
        stream.seek(0)
        data = stream.read()
        with contextlib.suppress(Exception):  # Pillow says what is wrong, or decodes it
            pixels = fast.decode(data)
            if pixels.shape == (image.height, image.width, 3):
                return pillow.fromarray(pixels)
        stream.seek(0)
    image.load()
    # The conversion drops transparency anyway, but PIL would warn about it in a palette.
    image.info.pop("transparency", None)
    return image.convert("RGB")


def decoder() -> str:
    """Return what decodes the images, and its version: pixels of a JPEG file may differ between versions."""
    import PIL

    fast = fast_decoder()
    return f"Pillow {PIL.__version__}" + (f", {fast.name}" if fast is not None else "")
