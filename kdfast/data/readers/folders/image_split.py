"""A split of image files, decoded on reading.

EXIF orientation is not applied, as in common training pipelines, so that teachers trained with those see the same
pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kdfast.data.readers.folders.image_file import Encoded, decode_rgb, decoder, opened_image
from kdfast.data.source import Pixels, check_sample_ids
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError
from kdfast.files.remembered import stamp_files

if TYPE_CHECKING:
    from PIL.Image import Image

_CHECKED_AT_OPENING = 1000
_MIN_FOR_THREADS = 8


class ImageSplit:
    """Split of image files, decoded on reading.

    Args:
        files: Path of each sample, or the image file inside another file.
        labels: Class of each sample, int64 `(N,)`.
        size: Scale the shorter side of every image to `size` pixels (bilinear, antialiased), then crop the central
            square. None if all images have the same size.
        containers: The files that hold the images, if `files` are no paths.

    Attributes:
        files: Path of each sample; None if they are inside other files.
        from_files: True: an image is decoded when it is read.

    Raises:
        DataError: The images differ in size and `size` is None (up to 1,000 are checked), or one is unreadable.
    """

    from_files = True

    def __init__(
        self,
        files: Sequence[str] | Sequence[Encoded],
        labels: IntArray,
        size: int | None,
        containers: Sequence[str] | None = None,
    ) -> None:
        self._files = files
        self.files = None if containers is not None else files
        self._labels = labels
        self._size = size
        self._containers = containers
        self._stamp: str | None = None  # of millions of files it takes seconds
        self._shape = (size, size, 3) if size else self._common_shape()

    @property
    def labels(self) -> IntArray:
        """Class of each sample, int64 `(N,)`."""
        return self._labels

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of every image, `(H, W, 3)`."""
        return self._shape

    def __len__(self) -> int:
        return len(self._files)

    def read(self, ids: npt.ArrayLike) -> Pixels:
        """Decode the samples `ids`, integers `(n,)`, to uint8 `(n, H, W, 3)`, on all cores.

        Raises:
            DataError: A file is missing, damaged, or of another size.
        """
        order = check_sample_ids(ids, len(self))
        out = np.empty((len(order), *self._shape), np.uint8)

        def decode(row: int) -> None:
            out[row] = self._decode(self._files[order[row]])

        if len(order) < _MIN_FOR_THREADS:
            for row in range(len(order)):
                decode(row)
            return out
        with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "kdfast-images") as pool:
            futures = [pool.submit(decode, row) for row in range(len(order))]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        return out

    def stamp(self) -> str | None:
        """Return a digest of the files, their labels and how they are decoded; None if it is not known."""
        if self._stamp is None:
            files = self._containers if self._containers is not None else [str(file) for file in self._files]
            self._stamp = stamp_files(files, self._size, self._shape, decoder(), self._labels.tobytes())
        return self._stamp

    def _decode(self, file: str | Encoded) -> Pixels:
        with opened_image(file) as image:
            rgb = decode_rgb(image)
        if self._size:
            rgb = _fit(rgb, self._size)
        pixels = np.asarray(rgb)
        if pixels.shape != self._shape:
            raise _mixed_sizes(file, pixels.shape, self._shape)
        return pixels

    def _common_shape(self) -> tuple[int, int, int]:
        """Return the common shape of the images, from the headers of an even sample; `read` checks the others."""
        count = min(len(self._files), _CHECKED_AT_OPENING)
        shape: tuple[int, int, int] | None = None
        for index in np.linspace(0, len(self._files) - 1, count).astype(np.int64):
            file = self._files[index]
            with opened_image(file) as image:
                found = (image.height, image.width, 3)
            if shape is not None and found != shape:
                raise _mixed_sizes(file, found, shape)
            shape = found
        if shape is None:
            raise DataError("there are no image files: add at least one")
        return shape


def _fit(image: Image, size: int) -> Image:
    """Scale the shorter side to `size` and crop the central square."""
    from PIL.Image import Resampling

    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    scaled = image.resize((width, height), Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return scaled.crop((left, top, left + size, top + size))


def _mixed_sizes(file: str | Encoded, found: Sequence[int], wanted: Sequence[int]) -> DataError:
    return DataError(
        f"{file} is {found[1]}x{found[0]}, other images are {wanted[1]}x{wanted[0]}; "
        "set `size` to resize all to one square"
    )
