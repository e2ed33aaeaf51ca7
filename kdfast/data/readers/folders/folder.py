"""Image folders: one sub-folder per class under `train/`, and under `test/` or `val/`.

Classes are the sub-folders of `train/`, sorted by name (by code point). Samples are ordered by class, then by path,
name by name; `order` says otherwise. A folder of class folders without `train/` needs a rule for its test split.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from kdfast.data.readers.folders.image_file import is_image_name
from kdfast.data.readers.folders.image_list import is_directory
from kdfast.data.readers.folders.image_split import ImageSplit
from kdfast.data.readers.folders.layout import LOOKED_FOR, TEST_NAMES, TRAIN_NAMES, find_folders, list_test, list_train
from kdfast.data.readers.folders.lists import is_lists
from kdfast.data.readers.split import SplitRule, train_and_test
from kdfast.data.source import Source, default_view_spec
from kdfast.errors import DataError

__all__ = ["TEST_NAMES", "TRAIN_NAMES", "is_class_folders", "is_folder", "open_class_folders", "open_folder"]

_TRIED = 20  # folders and files that are looked at to recognize class folders


def is_folder(path: Path) -> bool:
    """Return whether `path` is a folder with a sub-folder `train` that holds folders, or nothing of another kind."""
    roots = find_folders(path, TRAIN_NAMES)
    return bool(roots) and (_has_folders(roots[0]) or not (_holds_records(roots[0]) or is_lists(path)))


def is_class_folders(path: Path) -> bool:
    """Return whether `path` has at least two sub-folders with images, and none named like a split."""
    if not path.is_dir() or is_lists(path) or find_folders(path, TRAIN_NAMES + TEST_NAMES):
        return False
    with os.scandir(path) as entries:
        folders = [e.path for e in entries if not e.name.startswith(".") and is_directory(e)]
    return len(folders) > 1 and sum(map(_has_image, sorted(folders)[:_TRIED])) > 1


def open_folder(path: Path, size: int | None, order: str = "path", split: SplitRule | None = None) -> Source:
    """Open an image folder.

    Args:
        path: Folder with `train/<class>/...` and `test/<class>/...`, or one of the other names of a test split.
        size: Scale the shorter side of every image to `size` pixels (bilinear, antialiased), then crop the central
            square. None if all images have the same size.
        order: Of the samples of a class: "path", or "imagefolder" for that of torchvision's ImageFolder, which differs
            if a class has sub-folders.
        split: How to take the test split from the training images, where there is none.

    Returns:
        The source. Views flip; images of 64 pixels or more are augmented by random resized crops.

    Raises:
        DataError: A split or class is missing or empty, or the images differ in size and `size` is None.
        UsageError: `split` is given, and there is a test split.
    """
    root = find_folders(path, TRAIN_NAMES)[0]
    classes, train_files = list_train(root, order)
    test_files, unlabeled = list_test(path, classes, order)
    if test_files is None and unlabeled and split is None:
        raise DataError(
            f"{'; '.join(unlabeled)}: store test images as {find_folders(path, TEST_NAMES)[-1]}/<class>/<image files>, "
            "with the classes of train/, or take a share of every class with `split`, such as 0.1"
        )
    train = ImageSplit(train_files.files, train_files.labels, size)
    test = None if test_files is None else ImageSplit(test_files.files, test_files.labels, size)
    notes = train_files.notes + (unlabeled if test_files is None else test_files.notes)
    return _source(path, classes, train, test, split, notes)


def open_class_folders(path: Path, size: int | None, order: str = "path", split: SplitRule | None = None) -> Source:
    """Open a folder whose sub-folders are the classes, as `open_folder` does; `split` is needed.

    Raises:
        DataError: `split` is None, a class is empty, or the images differ in size and `size` is None.
    """
    classes, files = list_train(path, order)
    return _source(path, classes, ImageSplit(files.files, files.labels, size), None, split, files.notes, "classes")


def _source(
    path: Path,
    classes: tuple[str, ...],
    train: ImageSplit,
    test: ImageSplit | None,
    rule: SplitRule | None,
    notes: tuple[str, ...],
    kind: str = "folder",
) -> Source:
    first, second, decided = train_and_test(train, test, rule, str(path), LOOKED_FOR)
    views = default_view_spec(train.shape, flip=True)
    return Source(str(path), kind, classes, first, second, views, notes=notes + decided)


def _has_folders(root: Path) -> bool:
    with os.scandir(root) as entries:
        return any(is_directory(entry) and not entry.name.startswith(".") for entry in entries)


def _holds_records(root: Path) -> bool:
    """Return whether a folder has files that hold many images each, such as .tar."""
    with os.scandir(root) as entries:
        return any(entry.name.lower().endswith((".tar", ".parquet", ".arrow")) for entry in entries)


def _has_image(folder: str) -> bool:
    """Return whether one of the first files in a folder, at any depth, is an image."""
    files = (name for _, _, names in os.walk(folder) for name in sorted(names) if not name.startswith("."))
    return any(is_image_name(name) for name in itertools.islice(files, _TRIED))
