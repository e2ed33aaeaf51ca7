"""Find the splits of an image folder: which files belong to which class.

The training split has one sub-folder per class. The test split is the first of `TEST_NAMES` with labels: sub-folders
named as classes, or the `val_annotations.txt` of Tiny-ImageNet, as downloaded, whose images lie in one folder. An
unlabeled test split, as challenges publish it, is skipped.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdfast.data.readers.folders.image_file import SUFFIXES
from kdfast.data.readers.folders.image_list import ImageLister
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError
from kdfast.files.inputs import MAX_TEXT_BYTES, read_bounded

TEST_NAMES = ("test", "val")
ANNOTATIONS = "val_annotations.txt"


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


def list_test(path: Path, classes: tuple[str, ...], order: str) -> ImageFiles:
    """Return the files of the first labeled test split, by class.

    Args:
        path: The folder with `train/`.
        classes: Names of the classes.
        order: As for the training split.

    Raises:
        DataError: There is no test split, none has labels, or the first with labels has classes that train/ lacks.
    """
    roots = [path / name for name in TEST_NAMES if (path / name).is_dir()]
    if not roots:
        raise DataError(f"{path} has train/ but neither test/ nor val/: add one with the test images by class")
    unlabeled: list[str] = []
    for root in roots:
        found = _list_sorted(root, classes, order) or _list_annotated(root, classes, order)
        if isinstance(found, ImageFiles):
            notes = tuple(f"{reason}; the test images are those of {root}" for reason in unlabeled)
            return ImageFiles(found.files, found.labels, found.notes + notes)
        unlabeled.append(_why_unlabeled(root, classes, order))
    raise DataError(
        f"{'; '.join(unlabeled)}: store test images as {roots[-1]}/<class>/<image files>, with the classes of train/"
    )


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


def _list_annotated(root: Path, classes: tuple[str, ...], order: str) -> ImageFiles | None:
    """Return the files of a split whose classes are in `ANNOTATIONS`; None without that file.

    Each line holds a file name, its class and further values, separated by tabs.

    Raises:
        DataError: The annotations cannot be read, name an image twice or one that is missing, or an unknown class.
    """
    table = root / ANNOTATIONS
    if not table.exists():
        return None
    labels = _read_annotations(table, classes)
    lister = ImageLister(root, order, known=(ANNOTATIONS,))
    listed = lister.list_images(root)
    paths = {os.path.basename(path): path for path in listed}
    if len(paths) < len(listed):
        raise DataError(f"{root} has several images of one name, which {ANNOTATIONS} cannot tell apart: rename them")
    missing = sorted(labels.keys() - paths.keys())
    if missing:
        raise DataError(f"{table} names {len(missing)} images that {root} lacks, such as {missing[0]}: add them")
    by_class: list[list[str]] = [[] for _ in classes]
    for name, path in paths.items():
        if name in labels:
            by_class[labels[name]].append(path)
    extra = len(paths) - len(labels)
    notes = (f"{root}: skipped {extra} images that {ANNOTATIONS} does not name",) if extra else ()
    found = _join(by_class, lister)
    empty = [name for name, files in zip(classes, by_class, strict=True) if not files]
    return ImageFiles(found.files, found.labels, found.notes + notes + _note_empty(root, empty))


def _read_annotations(table: Path, classes: tuple[str, ...]) -> dict[str, int]:
    """Return the label of each image by its name."""
    try:
        lines = os.fsdecode(read_bounded(table, MAX_TEXT_BYTES)).splitlines()
    except OSError as error:
        raise DataError(f"cannot read {table}: {error.strerror or error}") from error
    known = {name: label for label, name in enumerate(classes)}
    labels: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, rest = line.partition("\t")
        of_class = rest.partition("\t")[0]
        if of_class not in known:
            raise DataError(f"{table}, line {number}: {of_class[:80]!r} is not a class of train/: correct the line")
        if name in labels:
            raise DataError(f"{table}, line {number}: {name[:80]} appears twice: remove one of the lines")
        labels[name] = known[of_class]
    if not labels:
        raise DataError(f"{table} is empty: download it again")
    return labels


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
