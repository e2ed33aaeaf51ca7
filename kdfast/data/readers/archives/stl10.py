"""STL-10 in its official binary files."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.source import ArraySplit, Source, default_view_spec
from kdfast.errors import DataError
from kdfast.files.inputs import available_memory, open_regular

_FOLDER = "stl10_binary"
_ARCHIVE = "stl10_binary.tar.gz"
_SHAPE = (3, 96, 96)
_NAMES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
_FILES = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")


def is_stl10(path: Path) -> bool:
    """Return whether `path` is the folder of STL-10's binary files, its parent, or the archive."""
    return path.name == _ARCHIVE or _folder(path) is not None


def open_stl10(path: Path) -> Source:
    """Read the labeled images of STL-10: 5,000 to train on, 8,000 to test on, of 96 x 96 pixels, 10 classes.

    The files number the classes from 1; here they are 0 to 9. Views flip.

    Raises:
        DataError: A file is missing or damaged, or the archive is not unpacked.
    """
    folder = _folder(path)
    if folder is None:
        raise DataError(f"{path} is packed: unpack it with tar -xzf, and pass the folder {_FOLDER}")
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise DataError(f"{folder} lacks {', '.join(missing)}: unpack {_ARCHIVE} again")
    train, test = (_read_split(folder, part) for part in ("train", "test"))
    notes = (f"{folder}: skipped unlabeled_X.bin, whose images have no classes",)
    has_unlabeled = (folder / "unlabeled_X.bin").is_file()
    return Source(
        str(path),
        "stl10",
        _NAMES,
        train,
        test,
        default_view_spec(train.shape, flip=True),
        notes=notes if has_unlabeled else (),
    )


def _folder(path: Path) -> Path | None:
    for folder in (path, path / _FOLDER):
        if any((folder / name).is_file() for name in (_FILES[0], _FILES[2])):
            return folder
    return None


def _read_split(folder: Path, part: str) -> ArraySplit:
    pixels, labels = (_read(folder / f"{part}_{what}.bin") for what in "Xy")
    if pixels.size % np.prod(_SHAPE) or pixels.size // np.prod(_SHAPE) != labels.size:
        raise DataError(
            f"{folder / f'{part}_X.bin'} has {pixels.size} bytes for {labels.size} labels, not {np.prod(_SHAPE)} each: "
            f"unpack {_ARCHIVE} again"
        )
    if labels.size and not 1 <= labels.min() <= labels.max() <= len(_NAMES):
        raise DataError(
            f"{folder / f'{part}_y.bin'} has labels from {labels.min()} to {labels.max()}, not 1 to {len(_NAMES)}: "
            f"unpack {_ARCHIVE} again"
        )
    # Each channel is stored column by column.
    images = pixels.reshape(-1, *_SHAPE).transpose(0, 3, 2, 1)
    return ArraySplit(images, labels.astype(np.int64) - 1, str(folder / f"{part}_X.bin"))


def _read(path: Path) -> npt.NDArray[Any]:
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > (free := available_memory()):
                raise DataError(f"{path} has {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free")
            return np.frombuffer(file.read(size), np.uint8)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
