"""Image folders: one sub-folder per class under `train/`, and under `test/` or `val/`.

Classes are the sub-folders of `train/`, sorted by name (by code point). Samples are ordered by class, then by path,
name by name; `order` says otherwise. Images are decoded on reading. EXIF orientation is not applied, as in common
training pipelines, so that teachers trained with those see the same pixels.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kdfast.data.readers.folders.image_file import opened_image
from kdfast.data.readers.folders.layout import TEST_NAMES, list_test, list_train
from kdfast.data.source import Pixels, Source, check_sample_ids, default_view_spec
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["TEST_NAMES", "FolderSplit", "is_folder", "open_folder"]

_CHECKED_AT_OPENING = 1000
_MIN_FOR_THREADS = 8


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder with a sub-folder `train`."""
    return (path / "train").is_dir()


def open_folder(path: Path, size: int | None, order: str = "path") -> Source:
    """Open an image folder.

    Args:
        path: Folder with `train/<class>/...` and `test/<class>/...`, or `val/` without a labeled `test/`.
        size: Scale the shorter side of every image to `size` pixels (bilinear, antialiased), then crop the central
            square. None if all images have the same size.
        order: Of the samples of a class: "path", or "imagefolder" for that of torchvision's ImageFolder, which differs
            if a class has sub-folders.

    Returns:
        The source. Views flip; images of 64 pixels or more are augmented by random resized crops.

    Raises:
        DataError: A split or class is missing or empty, or the images differ in size and `size` is None.
    """
    classes, train_files = list_train(path / "train", order)
    test_files = list_test(path, classes, order)
    train, test = (FolderSplit(found.files, found.labels, size) for found in (train_files, test_files))
    return Source(
        path=str(path),
        kind="folder",
        classes=classes,
        train=train,
        test=test,
        view_spec=default_view_spec(train.shape, flip=True),
        notes=train_files.notes + test_files.notes,
    )


class FolderSplit:
    """Split of image files, decoded on reading.

    Args:
        files: Path of each sample.
        labels: Class of each sample, int64 `(N,)`.
        size: See `open_folder`.

    Attributes:
        files: Path of each sample.

    Raises:
        DataError: The images differ in size and `size` is None (up to 1,000 are checked), or one is unreadable.
    """

    def __init__(self, files: Sequence[str], labels: IntArray, size: int | None) -> None:
        self.files = files
        self._labels = labels
        self._size = size
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
        return len(self.files)

    def read(self, ids: npt.ArrayLike) -> Pixels:
        """Decode the samples `ids`, integers `(n,)`, to uint8 `(n, H, W, 3)`, on all cores.

        Raises:
            DataError: A file is missing, damaged, or of another size.
        """
        order = check_sample_ids(ids, len(self))
        out = np.empty((len(order), *self._shape), np.uint8)

        def decode(row: int) -> None:
            out[row] = self._decode(self.files[order[row]])

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

    def _decode(self, file: str) -> Pixels:
        with opened_image(file) as image:
            image.load()
            # The conversion drops transparency anyway, but PIL would warn about it in a palette.
            image.info.pop("transparency", None)
            rgb = image.convert("RGB")
        if self._size:
            rgb = _fit(rgb, self._size)
        pixels = np.asarray(rgb)
        if pixels.shape != self._shape:
            raise _mixed_sizes(file, pixels.shape, self._shape)
        return pixels

    def _common_shape(self) -> tuple[int, int, int]:
        """Return the common shape of the images, from the headers of an even sample; `read` checks the others."""
        count = min(len(self.files), _CHECKED_AT_OPENING)
        shape: tuple[int, int, int] | None = None
        for index in np.linspace(0, len(self.files) - 1, count).astype(np.int64):
            file = self.files[index]
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


def _mixed_sizes(file: str, found: Sequence[int], wanted: Sequence[int]) -> DataError:
    return DataError(
        f"{file} is {found[1]}x{found[0]}, other images are {wanted[1]}x{wanted[0]}; "
        "set `size` to resize all to one square"
    )
