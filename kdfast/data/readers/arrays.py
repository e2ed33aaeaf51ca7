"""Sources that are arrays: official SVHN .mat files, .npz files, and scikit-learn's digits."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.data.source import ArraySplit, Source, generic_views, inferred_classes
from kdfast.data.views import ViewSpec
from kdfast.errors import DataError

SVHN_FILES = ("train_32x32.mat", "test_32x32.mat")
_NPZ_KEYS = ("train_images", "train_labels", "test_images", "test_labels")
_DIGITS_TEST_SHARE = 5


def is_svhn(path: Path) -> bool:
    """Whether `path` is a folder with one of SVHN's cropped-digits files."""
    return path.is_dir() and any((path / name).is_file() for name in SVHN_FILES)


def open_svhn(path: Path) -> Source:
    """Read SVHN's cropped digits from `train_32x32.mat` and `test_32x32.mat`.

    The files call the digit zero class 10; here it is class 0. Views shift by up to 4 pixels and do not flip.

    Raises:
        DataError: A file is missing, damaged, or not an SVHN file.
    """
    train, test = (_svhn_split(path / name) for name in SVHN_FILES)
    views = ViewSpec(kind="shift", size=train.shape[:2], pad=4, flip=False)
    return Source(str(path), "svhn", tuple(str(digit) for digit in range(10)), train, test, views)


def _svhn_split(path: Path) -> ArraySplit:
    if not path.is_file():
        raise DataError(f"{path.parent} lacks {path.name}; SVHN needs both {' and '.join(SVHN_FILES)}")
    from scipy.io import loadmat

    try:
        content = loadmat(path, variable_names=["X", "y"])
        images, labels = content["X"], content["y"]
    except KeyError as error:
        raise DataError(f"{path} has no variable {error}; needed: X and y of the official file") from error
    except Exception as error:  # a damaged file makes scipy raise errors of nearly every kind
        raise DataError(f"{path} is damaged or not a MATLAB 5 file ({error}); download it again") from error
    if images.ndim != 4 or labels.dtype.kind not in "iu" or labels.size != images.shape[-1]:
        raise DataError(
            f"{path}: X is {images.shape}, y {labels.dtype} {labels.shape}; needed: (H, W, 3, N) and (N, 1)"
        )
    digits = labels.reshape(-1).astype(np.int64)
    return ArraySplit(images.transpose(3, 0, 1, 2), np.where(digits == 10, 0, digits), str(path))


def is_npz(path: Path) -> bool:
    """Whether `path` is a file whose name ends in .npz."""
    return path.is_file() and path.suffix == ".npz"


def open_npz(path: Path) -> Source:
    """Read `train_images`, `train_labels`, `test_images` and `test_labels` from an .npz.

    Images are uint8 `(N, H, W, 3)` or grey `(N, H, W)`; labels are integers `(N,)`, 0 to C - 1 without a gap. The
    classes are called `0`, `1`, ... Views do not flip: nothing says that a mirrored image keeps its class.

    Raises:
        DataError: An array is missing, damaged, or of another dtype or shape.
    """
    try:
        # Opened here: np.load leaves a damaged file that it opened itself open.
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            missing = [key for key in _NPZ_KEYS if key not in file.files]
            if missing:
                raise DataError(f"{path} lacks {', '.join(missing)}; it holds {', '.join(file.files) or 'nothing'}")
            arrays: dict[str, Any] = {key: file[key] for key in _NPZ_KEYS}
    except DataError:
        raise
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged or not an .npz of plain arrays ({error}); write it again") from error
    train, test = (
        ArraySplit(arrays[f"{part}_images"], _column(arrays[f"{part}_labels"]), f"{part}_images of {path}")
        for part in ("train", "test")
    )
    classes = inferred_classes(train.labels, str(path))
    return Source(str(path), "npz", classes, train, test, generic_views(train.shape, flip=False))


def _column(labels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Labels of shape (N, 1), as some collections store them, as (N,)."""
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def open_digits() -> Source:
    """Read scikit-learn's 1,797 handwritten digits, 8x8, bundled with it.

    The 17 grey levels are spread over 0 to 255 and the one channel becomes three. The bundle has no split of its
    own: in each class the fifth of the samples with the smallest SHA-256 of `kdfast digits <index>` is the test split,
    the same on every machine. Both splits keep the bundle's order. Views shift by up to 1 pixel and do not flip.
    """
    from sklearn.datasets import load_digits

    bundle = load_digits()
    images = np.rint(bundle.images * (255 / 16)).astype(np.uint8)
    labels = bundle.target.astype(np.int64)
    test = np.zeros(len(labels), bool)
    for digit in range(10):
        members = sorted(np.flatnonzero(labels == digit).tolist(), key=_lot)
        test[members[: len(members) // _DIGITS_TEST_SHARE]] = True
    return Source(
        path="digits",
        kind="digits",
        classes=tuple(str(digit) for digit in range(10)),
        train=ArraySplit(images[~test], labels[~test], "digits: training images"),
        test=ArraySplit(images[test], labels[test], "digits: test images"),
        views=ViewSpec(kind="shift", size=(8, 8), pad=1, flip=False),
    )


def _lot(index: int) -> bytes:
    return hashlib.sha256(f"kdfast digits {index}".encode()).digest()


def listing(names: Iterable[str], limit: int = 5) -> str:
    """The first few names and how many more there are, for an error message."""
    every = sorted(names)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(every[:limit]) + more if every else "nothing"
