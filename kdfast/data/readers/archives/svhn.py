"""SVHN's cropped digits in their official .mat files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from kdfast.data.source import ArraySplit, Source
from kdfast.data.views import ViewSpec
from kdfast.errors import DataError
from kdfast.files.inputs import available_memory

_VARIABLES = ("X", "y")

FILES = ("train_32x32.mat", "test_32x32.mat")
EXTRA = "extra_32x32.mat"


def is_svhn(path: Path) -> bool:
    """Return whether `path` is a folder with at least one of SVHN's cropped-digits files."""
    return path.is_dir() and any((path / name).is_file() for name in FILES)


def open_svhn(path: Path) -> Source:
    """Read SVHN's cropped digits from `train_32x32.mat` and `test_32x32.mat`.

    The files label the digit zero as class 10; here it is class 0. Views shift by up to 4 pixels and do not flip. The
    simpler digits of `extra_32x32.mat` are not read: papers on subsets train on the 73,257 of the first file.

    Raises:
        DataError: A file is missing, damaged, or not an SVHN file.
    """
    train, test = (_read_split(path / name) for name in FILES)
    views = ViewSpec(kind="shift", size=train.shape[:2], pad=4, flip=False)
    notes = (f"{path / EXTRA} is not read: the training split is {FILES[0]}",) if (path / EXTRA).exists() else ()
    return Source(str(path), "svhn", tuple(str(digit) for digit in range(10)), train, test, views, notes=notes)


def _read_split(path: Path) -> ArraySplit:
    if not path.is_file():
        raise DataError(f"{path.parent} lacks {path.name}; SVHN needs both {' and '.join(FILES)}")
    from scipy.io import loadmat, whosmat  # slow to import

    try:
        need = sum(math.prod(shape) for name, shape, _ in whosmat(path) if name in _VARIABLES)  # X is uint8
        if need > (free := available_memory()):
            raise ValueError(f"it takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free")
        content = loadmat(path, variable_names=_VARIABLES)
        images, labels = content["X"], content["y"]
    except KeyError as error:
        raise DataError(f"{path} has no variable {error}: use the official file, which has X and y") from error
    except Exception as error:  # scipy raises errors of nearly every type on a damaged file
        raise DataError(f"{path} is damaged or not a MATLAB 5 file ({error}): download it again") from error
    if images.ndim != 4 or labels.dtype.kind not in "iu" or labels.size != images.shape[-1]:
        raise DataError(
            f"{path}: X is {images.shape}, y {labels.dtype} {labels.shape}: must be (H, W, 3, N), and integers (N, 1)"
        )
    digits = labels.reshape(-1).astype(np.int64)
    return ArraySplit(images.transpose(3, 0, 1, 2), np.where(digits == 10, 0, digits), str(path))
