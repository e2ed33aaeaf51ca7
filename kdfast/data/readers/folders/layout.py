"""Find the splits of an image folder: which files belong to which class.

The training split has one sub-folder per class. The test split is the first of `TEST_NAMES` with labels: sub-folders
named as classes, or images in one folder with a list of their classes, such as the `val_annotations.txt` of
Tiny-ImageNet. An unlabeled test split, as challenges publish it, is skipped. The case of the names does not matter.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdfast.data.readers.folders.annotations import find_annotations, own_annotations, read_annotations
from kdfast.data.readers.folders.image_file import SUFFIXES
from kdfast.data.readers.folders.image_list import ImageLister, is_directory
from kdfast.data.readers.folders.pairs import ANNOTATIONS
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError

TRAIN_NAMES = ("train", "training")
TEST_NAMES = ("test", "val", "valid", "validation", "testing", "eval")
LOOKED_FOR = "/, ".join(TEST_NAMES) + "/, in any case"


@dataclass(frozen=True)
class ImageFiles:
    """The files of a split.

    Attributes:
        files: Path of each sample.
        labels: Class of each sample, int64 `(N,)`.
        notes: What was left out, one sentence each.
    """

    files: list[str]
    labels: IntArray
    notes: tuple[str, ...]


def find_folders(path: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the sub-folders of a folder with one of the names, in the order of the names.

    A name in lower case is preferred to the same in another case.

    Raises:
        DataError: Several folders differ only in the case of their names.
    """
    try:
        with os.scandir(path) as entries:
            folders = sorted(entry.name for entry in entries if is_directory(entry))
    except OSError:
        return []
    found = []
    for name in names:
        same = [folder for folder in folders if folder.lower() == name]
        if len(same) > 1 and name not in same:
            raise DataError(f"{path} has {' and '.join(f'{folder}/' for folder in same)}: remove or rename all but one")
        found += [name] if name in same else same
    return [path / name for name in found]


def list_train(root: Path, order: str) -> tuple[tuple[str, ...], ImageFiles]:
    """Return the class names, sorted by code point, and the files of the training split, by class.

    Raises:
        DataError: There is no class, or one without images.
    """
    lister = ImageLister(root, order)
    classes = lister.class_folders()
    if not classes:
        raise DataError(f"{root} has no class folders: store the images as {root}/<class>/<image files>")
    by_class = [lister.list_images(root / name) for name in classes]
    for name, files in zip(classes, by_class, strict=True):
        if not files:
            raise DataError(f"{root / name} has no images ({', '.join(SUFFIXES)}): add some or remove the class")
    return classes, _join(by_class, lister)


def list_test(path: Path, classes: tuple[str, ...], order: str) -> tuple[ImageFiles | None, tuple[str, ...]]:
    """Return the files of the first labeled test split, by class.

    Args:
        path: The folder with `train/`.
        classes: Names of the classes.
        order: As for the training split.

    Returns:
        The files, or None if no test split has labels; and why the test splits before it were skipped.

    Raises:
        DataError: The first test split with labels has classes that train/ lacks, or its list of classes is wrong.
    """
    roots = find_folders(path, TEST_NAMES)
    # Lists that lie beside the folders come last: public ones name a dummy class for the images of a challenge.
    for tables in (own_annotations, find_annotations):
        unlabeled: list[str] = []
        for root in roots:
            found = _list_sorted(root, classes, order) or _list_annotated(root, tables(root), classes, order)
            if isinstance(found, ImageFiles):
                notes = tuple(f"{reason}; the test images are those of {root}" for reason in unlabeled)
                return ImageFiles(found.files, found.labels, found.notes + notes), ()
            unlabeled.append(_why_unlabeled(root, classes, order))
    return None, tuple(unlabeled)


def _list_sorted(root: Path, classes: tuple[str, ...], order: str) -> ImageFiles | None:
    """Return the files of a split with class folders; None if it has none of the classes, or no images in them."""
    lister = ImageLister(root, order)
    names = lister.class_folders()
    by_class = [lister.list_images(root / name) if name in set(names) else [] for name in classes]
    if not any(by_class):
        return None
    unknown = [name for name in names if name not in set(classes)]
    if unknown:
        raise DataError(f"{root} has classes that train/ lacks: {', '.join(unknown)}; add or remove them")
    found = _join(by_class, lister)
    empty = [name for name, files in zip(classes, by_class, strict=True) if not files]
    return ImageFiles(found.files, found.labels, found.notes + _note_empty(root, empty))


def _note_empty(root: Path, classes: list[str]) -> tuple[str, ...]:
    """Return a note about classes without test images, on which accuracies then say nothing; none without any."""
    if not classes:
        return ()
    shown = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
    return (f"{root} has no images of {len(classes)} class{'es' * (len(classes) > 1)} of train/: {shown}",)


def _list_annotated(root: Path, table: Path | None, classes: tuple[str, ...], order: str) -> ImageFiles | None:
    """Return the files of a split whose classes are in a list; None without a list, or if all have one class.

    Raises:
        DataError: The list cannot be read, names an image twice or one that is missing, or an unknown class.
    """
    if table is None:
        return None
    labels, notes = read_annotations(table, classes)
    if table.name != ANNOTATIONS and len(set(labels.values())) < min(len(classes), len(labels), 2):
        return None
    lister = ImageLister(root, order, known=(table.name,))
    listed = lister.list_images(root)
    paths = {os.path.basename(path): path for path in listed}
    if len(paths) < len(listed):
        raise DataError(f"{root} has several images of one name, which {table.name} cannot tell apart: rename them")
    if not labels.keys() & paths.keys():  # a list of names without their suffixes
        paths = {os.path.splitext(name)[0]: path for name, path in paths.items()}
    missing = sorted(labels.keys() - paths.keys())
    if missing:
        raise DataError(f"{table} names {len(missing)} images that {root} lacks, such as {missing[0]}: add them")
    by_class: list[list[str]] = [[] for _ in classes]
    for name, path in paths.items():
        if name in labels:
            by_class[labels[name]].append(path)
    if extra := len(paths) - len(labels):
        notes += (f"{root}: skipped {extra} images that {table.name} does not name",)
    found = _join(by_class, lister)
    empty = [name for name, files in zip(classes, by_class, strict=True) if not files]
    return ImageFiles(found.files, found.labels, found.notes + notes + _note_empty(root, empty))


def _why_unlabeled(root: Path, classes: tuple[str, ...], order: str) -> str:
    names = ImageLister(root, order).class_folders()
    if not names:
        return f"{root} has no class folders"
    if set(names) & set(classes):
        return f"{root} has no images in its class folders"
    return f"{root} has classes that train/ lacks: {', '.join(names[:5])}{', ...' * (len(names) > 5)}"


def _join(by_class: list[list[str]], lister: ImageLister) -> ImageFiles:
    labels = np.repeat(np.arange(len(by_class), dtype=np.int64), [len(files) for files in by_class])
    return ImageFiles([file for files in by_class for file in files], labels, lister.notes())
