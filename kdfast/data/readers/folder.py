"""Image folders: one sub-folder per class under `train/`, and under `test/` or `val/`.

Classes are the sub-folders of `train/`, sorted by name (by code point). Samples are ordered by class, then by path.
Images are decoded on reading. EXIF orientation is not applied, as in common training pipelines, so that teachers
trained with those see the same pixels.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from kdfast.data.source import Pixels, Source, check_sample_ids, default_view_spec
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_NAMES = ("test", "val")
_CHECKED_AT_OPENING = 1000
_DEEP_MODES = ("I", "F")
_MIN_FOR_THREADS = 8


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder with a sub-folder `train`."""
    return (path / "train").is_dir()


def open_folder(path: Path, size: int | None) -> Source:
    """Open an image folder.

    Args:
        path: Folder with `train/<class>/...` and `test/<class>/...` (or `val/` without `test/`).
        size: Scale the shorter side of every image to `size` pixels (bilinear, antialiased), then crop the central
            square. None if all images have the same size.

    Returns:
        The source. Views flip; images of 64 pixels or more are augmented by random resized crops.

    Raises:
        DataError: A split or class is missing or empty, or the images differ in size and `size` is None.
    """
    test_root = next((path / name for name in TEST_NAMES if (path / name).is_dir()), None)
    if test_root is None:
        raise DataError(f"{path} has train/ but neither test/ nor val/: add one with the test images by class")
    classes = _class_names(path / "train")
    unknown = set(_class_names(test_root)) - set(classes)
    if unknown:
        raise DataError(f"{test_root} has classes that train/ lacks: {', '.join(sorted(unknown))}; add or remove them")
    train = _scan(path / "train", classes, size, need_all=True)
    test = _scan(test_root, classes, size, need_all=False)
    return Source(str(path), "folder", classes, train, test, default_view_spec(train.shape, flip=True))


class FolderSplit:
    """Split of image files, decoded on reading.

    Args:
        files: Path of each sample.
        labels: Class of each sample, int64 `(N,)`.
        size: See `open_folder`.

    Raises:
        DataError: The images differ in size and `size` is None (up to 1,000 are checked), or one is unreadable.
    """

    def __init__(self, files: Sequence[str], labels: IntArray, size: int | None) -> None:
        self._files = files
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

    def _decode(self, file: str) -> Pixels:
        with _opened(file) as image:
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
        count = min(len(self._files), _CHECKED_AT_OPENING)
        shape: tuple[int, int, int] | None = None
        for index in np.linspace(0, len(self._files) - 1, count).astype(np.int64):
            file = self._files[index]
            with _opened(file) as image:
                found = (image.height, image.width, 3)
            if shape is not None and found != shape:
                raise _mixed_sizes(file, found, shape)
            shape = found
        if shape is None:
            raise DataError("there are no image files: add at least one")
        return shape


@contextlib.contextmanager
def _opened(file: str) -> Iterator[Image]:
    """Yield the image in a file; turn its errors into a DataError that names the file."""
    from PIL import Image  # optional dependency

    too_large = (Image.DecompressionBombError, Image.DecompressionBombWarning)
    try:
        with Image.open(file) as image:
            if image.mode.startswith(_DEEP_MODES):
                raise ValueError(f"its pixels are {image.mode}, not 8 bits per channel")
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, *too_large) as error:
        raise DataError(f"{file} cannot be read as an image ({error}): replace or remove it") from error


def _fit(image: Image, size: int) -> Image:
    """Scale the shorter side to `size` and crop the central square."""
    from PIL.Image import Resampling

    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    scaled = image.resize((width, height), Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    return scaled.crop((left, top, left + size, top + size))


def _class_names(root: Path) -> tuple[str, ...]:
    names = sorted(entry.name for entry in _entries(root) if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{root} has no class folders: store the images as {root}/<class>/<image files>")
    return tuple(names)


def _scan(root: Path, classes: tuple[str, ...], size: int | None, *, need_all: bool) -> FolderSplit:
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = _image_files(root / name)
        if need_all and not found:
            raise DataError(f"{root / name} has no images ({', '.join(SUFFIXES)}): add some or remove the class")
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{root} has no images ({', '.join(SUFFIXES)})")
    return FolderSplit(files, np.asarray(labels, np.int64), size)


def _image_files(folder: Path) -> list[str]:
    """Return the image files at any depth, sorted by path, without hidden files; none if the folder is missing."""
    found = []
    for parent, _, names in os.walk(folder):
        found += [
            os.path.join(parent, name) for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")
        ]
    return sorted(found)


def _entries(root: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(root) as entries:
            return list(entries)
    except OSError as error:
        raise DataError(f"cannot list {root}: {error.strerror or error}") from error


def _mixed_sizes(file: str, found: Sequence[int], wanted: Sequence[int]) -> DataError:
    return DataError(
        f"{file} is {found[1]}x{found[0]}, other images are {wanted[1]}x{wanted[0]}; "
        "set `size` to resize all to one square"
    )
