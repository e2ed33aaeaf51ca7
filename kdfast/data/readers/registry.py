"""The kinds of data sources, and the function that recognizes and opens one.

To add a kind, write a reader and an entry in SOURCES.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kdfast.data.ffcv.write import is_ffcv_folder, open_ffcv_folder
from kdfast.data.readers.archives import digits
from kdfast.data.readers.archives.cifar import CIFAR10, CIFAR100, is_cifar, open_cifar
from kdfast.data.readers.archives.idx import is_idx, open_idx
from kdfast.data.readers.archives.npz import is_npz, open_npz
from kdfast.data.readers.archives.stl10 import is_stl10, open_stl10
from kdfast.data.readers.archives.svhn import is_svhn, open_svhn
from kdfast.data.readers.folders.folder import is_class_folders, is_folder, open_class_folders, open_folder
from kdfast.data.readers.folders.image_list import ORDERS
from kdfast.data.readers.folders.lists import is_lists, open_lists
from kdfast.data.readers.records.shards import is_shards, open_shards
from kdfast.data.readers.records.tables import is_tables, open_tables
from kdfast.data.readers.relabel import is_relabelled, open_relabelled
from kdfast.data.readers.split import SplitRule, parse_split
from kdfast.data.source import Source
from kdfast.errors import DataError, DataWarning, UsageError, did_you_mean

_LISTED = 5
_LARGEST_SIDE = 65535
_ORDERED = ("folder", "classes", "relabelled")  # a relabelled source may refer to a folder


@dataclass(frozen=True)
class OpenOptions:
    """How to read images that lie in files of their own, and data without a test split; see `open_source`."""

    size: int | None = None
    order: str = ORDERS[0]
    split: SplitRule | None = None


@dataclass(frozen=True)
class SourceKind:
    """One kind of data source.

    Attributes:
        summary: What must be at the path, for help and error messages.
        detect: Returns whether a path is of this kind, complete or not.
        open: Reads it.
        divides: Whether it may lack a test split, which `split` then takes from the training images.
        loose: Whether other kinds go first, because a path may look like this one by chance.
    """

    summary: str
    detect: Callable[[Path], bool]
    open: Callable[[Path, OpenOptions], Source]
    divides: bool = False
    loose: bool = False


SOURCES: dict[str, SourceKind] = {
    "digits": SourceKind(
        "the word digits: scikit-learn's bundled 8x8 digits",
        lambda path: str(path) == digits.NAME,
        lambda path, given: digits.open_digits(),
    ),
    "cifar10": SourceKind(
        "the official CIFAR-10 python archive: cifar-10-batches-py, its parent folder, or the .tar.gz",
        lambda path: is_cifar(path, CIFAR10),
        lambda path, given: open_cifar(path, CIFAR10),
    ),
    "cifar100": SourceKind(
        "the official CIFAR-100 python archive: cifar-100-python, its parent folder, or the .tar.gz",
        lambda path: is_cifar(path, CIFAR100),
        lambda path, given: open_cifar(path, CIFAR100),
    ),
    "svhn": SourceKind(
        "a folder with SVHN's train_32x32.mat and test_32x32.mat",
        is_svhn,
        lambda path, given: open_svhn(path),
    ),
    "folder": SourceKind(
        "a folder of images: train/<class>/... and test/<class>/... or val/<class>/..., or <class>/...",
        is_folder,
        lambda path, given: open_folder(path, given.size, given.order, given.split),
        divides=True,
    ),
    "npz": SourceKind(
        "an .npz with train_images, train_labels, test_images and test_labels",
        is_npz,
        lambda path, given: open_npz(path, given.split),
        divides=True,
    ),
    "beton": SourceKind(
        "a folder with train.beton and test.beton, written by kdfast data convert",
        is_ffcv_folder,
        lambda path, given: open_ffcv_folder(path),
    ),
    "relabelled": SourceKind(
        "a folder written by kdfast data flip: the images of another source with some training labels changed",
        is_relabelled,
        lambda path, given: open_relabelled(path, lambda data: _open(data, given)),
        divides=True,
    ),
    "idx": SourceKind(
        "a folder with MNIST's train-images-idx3-ubyte and its companions, plain or .gz",
        is_idx,
        lambda path, given: open_idx(path),
        loose=True,
    ),
    "stl10": SourceKind(
        "the folder stl10_binary",
        is_stl10,
        lambda path, given: open_stl10(path),
        loose=True,
    ),
    "table": SourceKind(
        "a .parquet or .arrow file, or a folder of those, named by split or written by save_to_disk",
        is_tables,
        lambda path, given: open_tables(path, given.size, given.split),
        divides=True,
        loose=True,
    ),
    "shards": SourceKind(
        "a webdataset .tar, or a folder of those, named by split",
        is_shards,
        lambda path, given: open_shards(path, given.size, given.split),
        divides=True,
        loose=True,
    ),
    "classes": SourceKind(
        "a folder of images: <class>/..., with `split`",
        is_class_folders,
        lambda path, given: open_class_folders(path, given.size, given.order, given.split),
        divides=True,
        loose=True,
    ),
    "list": SourceKind(
        "a list of images with a line `path label` for each, or a folder with train.txt and test.txt",
        is_lists,
        lambda path, given: open_lists(path, given.size, given.split),
        divides=True,
        loose=True,
    ),
}
"""Name -> kind of data source."""


def open_source(
    path: str | os.PathLike[str],
    *,
    size: int | None = None,
    order: str = ORDERS[0],
    split: str | float | None = None,
) -> Source:
    """Recognize and open a data source. What a reader left out is a `DataWarning`.

    Args:
        path: A path of one of the kinds in SOURCES, or the word `digits` (a folder of that name is `./digits`).
        size: For images in files of their own: scale the shorter side of every image to `size` pixels and crop the
            central square. Other kinds accept only the size that their images have.
        order: For image folders: order of the samples of a class with sub-folders, see `open_folder`.
        split: For data without a test split: the share of every class of the training images that is the test split,
            such as 0.1, or share and seed, such as "0.1:7". The other images are the training split, numbered from 0.

    Returns:
        The source, its labels and image shapes checked.

    Raises:
        DataError: Nothing is at the path, it is of no known kind or of several, or it is damaged or incomplete.
        UsageError: `size` or `split` is out of range or does not fit, or `order` is unknown or given for another kind.
        BackendUnavailable: FFCV or pyarrow is needed and not installed.
    """
    if size is not None and not 1 <= size <= _LARGEST_SIDE:
        raise UsageError(f"`size` is {size}: pass 1 to {_LARGEST_SIDE} pixels")
    if order not in ORDERS:
        raise UsageError(f"`order` is {order!r}: {did_you_mean(order, ORDERS)}pass one of {', '.join(ORDERS)}")
    rule = parse_split(split)
    location = Path(path)
    kind = digits.NAME if os.fspath(path) == digits.NAME else _recognize(location)
    if order != ORDERS[0] and kind not in _ORDERED:
        raise UsageError(f"`order` is {order}, but {path} is no image folder and has an order of its own: omit it")
    if rule is not None and not SOURCES[kind].divides:
        raise UsageError(f"`split` is {split}, but {path} has a test split of its own: omit it")
    source = SOURCES[kind].open(location, OpenOptions(size, order, rule))
    if size is not None and source.train.shape != (size, size, 3):
        height, width, _ = source.train.shape
        raise UsageError(
            f"{path} has images of {width}x{height}, and `size` is {size}; only image folders can be resized: omit it"
        )
    if kind != "relabelled":  # its images were opened here too
        for note in source.notes:
            warnings.warn(note, DataWarning, stacklevel=2)
    return source


def _open(path: str | os.PathLike[str], options: OpenOptions) -> Source:
    kind = digits.NAME if os.fspath(path) == digits.NAME else _recognize(Path(path))
    return SOURCES[kind].open(Path(path), options)


def _recognize(path: Path) -> str:
    if not path.exists():
        raise DataError(f"there is nothing at {path}: check the path")
    try:
        found = _detect(path)
        names = os.listdir(path) if path.is_dir() else None
    except OSError as error:
        raise DataError(f"cannot list {error.filename or path}: {error.strerror or error}") from error
    if not found:
        content = "one file" if names is None else _shortened(names)
        known = "; ".join(kind.summary for kind in SOURCES.values())
        raise DataError(f"{path} ({content}) is not a known data source: pass one of: {known}")
    if len(found) > 1:
        raise DataError(f"{path} holds data of several kinds ({', '.join(found)}): pass the folder or file of one")
    return found[0]


def _detect(path: Path) -> list[str]:
    """Return the kinds that a path looks like; the loosely recognized ones only if it looks like no other."""
    for loose in (False, True):
        kinds = [kind for kind, entry in SOURCES.items() if entry.loose == loose and kind != digits.NAME]
        if found := [kind for kind in kinds if SOURCES[kind].detect(path)]:
            return found
    return []


def _shortened(names: list[str]) -> str:
    """Return the first few names and the number of the others."""
    names = sorted(names)
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more if names else "nothing"
