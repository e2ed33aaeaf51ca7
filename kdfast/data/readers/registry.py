"""Data sources: what lies at `--data PATH` is recognised, read and checked.

A new kind of source is one reader and one entry in SOURCES.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdfast.data.ffcv import write as convert
from kdfast.data.readers import arrays, cifar, folder, relabel
from kdfast.data.readers.datasets import from_datasets
from kdfast.data.source import ArraySplit, Source, Split, fingerprint_of, normalization_of
from kdfast.errors import DataError, UsageError

__all__ = [
    "SOURCES",
    "ArraySplit",
    "Source",
    "SourceKind",
    "Split",
    "fingerprint_of",
    "from_datasets",
    "normalization_of",
    "open_source",
]

DIGITS = "digits"


@dataclass(frozen=True)
class SourceKind:
    """One kind of data source.

    Attributes:
        summary: What has to lie at the path, for help and error messages.
        detect: Whether a path is of this kind, complete or not.
        open: Reads it; the second argument is `size`, None unless the caller gave one.
    """

    summary: str
    detect: Callable[[Path], bool]
    open: Callable[[Path, int | None], Source]


SOURCES: dict[str, SourceKind] = {
    "digits": SourceKind(
        "the word `digits`: scikit-learn's bundled 8x8 digits",
        lambda path: str(path) == DIGITS,
        lambda path, size: arrays.open_digits(),
    ),
    "cifar10": SourceKind(
        "the official CIFAR-10 python archive: cifar-10-batches-py, the folder around it, or the .tar.gz",
        lambda path: cifar.is_cifar(path, cifar.CIFAR10),
        lambda path, size: cifar.open_cifar(path, cifar.CIFAR10),
    ),
    "cifar100": SourceKind(
        "the official CIFAR-100 python archive: cifar-100-python, the folder around it, or the .tar.gz",
        lambda path: cifar.is_cifar(path, cifar.CIFAR100),
        lambda path, size: cifar.open_cifar(path, cifar.CIFAR100),
    ),
    "svhn": SourceKind(
        "a folder with SVHN's train_32x32.mat and test_32x32.mat",
        arrays.is_svhn,
        lambda path, size: arrays.open_svhn(path),
    ),
    "folder": SourceKind(
        "a folder of images: train/<class>/... and test/<class>/... or val/<class>/...",
        folder.is_folder,
        folder.open_folder,
    ),
    "npz": SourceKind(
        "an .npz with train_images, train_labels, test_images and test_labels",
        arrays.is_npz,
        lambda path, size: arrays.open_npz(path),
    ),
    "beton": SourceKind(
        "a folder with train.beton and test.beton, written by `kdfast data convert`",
        convert.is_betons,
        lambda path, size: convert.open_betons(path),
    ),
    "relabelled": SourceKind(
        "a folder written by `kdfast data flip`: another source's images with some training labels changed",
        relabel.is_relabelled,
        lambda path, size: relabel.open_relabelled(path, lambda data: open_source(data, size=size)),
    ),
}


def open_source(path: str | os.PathLike[str], *, size: int | None = None) -> Source:
    """Recognise and open a data source.

    Args:
        path: A path of one of the kinds in SOURCES, or the word `digits` (a folder of that name is `./digits`).
        size: For image folders: side of the square that every image is brought to (shorter side scaled, middle cut
            out). Other kinds take it only when it is the size they have.

    Returns:
        The source, its labels and image shapes checked.

    Raises:
        DataError: Nothing is there, it is of no known kind or of two, or it is damaged or incomplete.
        UsageError: `size` is below 1 or does not fit.
        BackendUnavailable: Betons, and FFCV is not installed.
    """
    if size is not None and size < 1:
        raise UsageError(f"the size is {size}; needed: 1 or more pixels")
    place = Path(path)
    kind = DIGITS if os.fspath(path) == DIGITS else _recognise(place)
    source = SOURCES[kind].open(place, size)
    if size is not None and source.train.shape != (size, size, 3):
        height, width, _ = source.train.shape
        raise UsageError(f"{path} has images of {width}x{height}; --size {size} is for image folders: leave it out")
    return source


def _recognise(path: Path) -> str:
    if not path.exists():
        raise DataError(f"there is nothing at {path}; check the path")
    found = [kind for kind in SOURCES if kind != DIGITS and SOURCES[kind].detect(path)]
    if not found:
        held = arrays.listing(os.listdir(path)) if path.is_dir() else "one file"
        known = "; ".join(kind.summary for kind in SOURCES.values())
        raise DataError(f"{path} ({held}) is no data source that kdfast knows. Needed: {known}")
    if len(found) > 1:
        raise DataError(f"{path} holds data of several kinds ({', '.join(found)}); give the folder or file of one")
    return found[0]
