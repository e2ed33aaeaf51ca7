"""The classes of test images that lie in one folder: find and read the list that comes with them."""

from __future__ import annotations

import os
from pathlib import Path

from kdfast.data.readers.folders.pairs import ANNOTATIONS, LIST_SUFFIXES, is_list, read_pairs
from kdfast.errors import DataError

# Of the list of a folder `val`, in the folder or beside it.
_STEMS = ("{0}", "{0}_annotations", "{0}_labels", "{0}_list", "LOC_{0}_solution", "annotations", "labels")


def own_annotations(root: Path) -> Path | None:
    """Return the `val_annotations.txt` in a folder, or None without it."""
    return root / ANNOTATIONS if (root / ANNOTATIONS).exists() else None


def find_annotations(root: Path) -> Path | None:
    """Return the list of the classes of the images in a folder, or None without one.

    It is, for a folder `val`, a list named `val`, `val_annotations`,
    `val_labels`, `val_list` or `LOC_val_solution` in it or beside it, or `annotations` or `labels` in it.

    Raises:
        DataError: There are several.
    """
    found = []
    for folder in (root, root.parent):
        stems = [stem.format(root.name) for stem in _STEMS if folder == root or "{0}" in stem]
        names = [stem + suffix for stem in stems for suffix in LIST_SUFFIXES]
        found += [folder / name for name in names if is_list(folder / name)]
    if len(found) > 1:
        raise DataError(
            f"{found[0]} and {found[1]} both list the classes of the images in {root}: remove or rename one of them"
        )
    return found[0] if found else None


def read_annotations(table: Path, classes: tuple[str, ...]) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the class of each image by its name, and notes on what was decided.

    Classes are named; if all are numbers that are no names, they are positions among the sorted names.

    Raises:
        DataError: The list cannot be read, or names an unknown class or an image twice.
    """
    pairs = read_pairs(table)
    known = {name: label for label, name in enumerate(classes)}
    notes: tuple[str, ...] = ()
    if not any(pair.label in known for pair in pairs) and all(pair.label.isdecimal() for pair in pairs):
        known = _by_position([int(pair.label) for pair in pairs], classes, table)
        ends = f"0 is {classes[0]}, {len(classes) - 1} is {classes[-1]}"
        notes = (f"{table} numbers the classes, in the order of their sorted names: {ends}",)
    labels: dict[str, int] = {}
    for pair in pairs:
        if pair.label not in known:
            raise DataError(
                f"{table}, line {pair.line}: {pair.label[:80]!r} is not a class of train/: correct the line"
            )
        name = os.path.basename(pair.path)
        if name in labels:
            raise DataError(f"{table}, line {pair.line}: {name[:80]} appears twice: remove one of the lines")
        labels[name] = known[pair.label]
    return labels, notes


def _by_position(numbers: list[int], classes: tuple[str, ...], table: Path) -> dict[str, int]:
    """Return the class of every number from 0."""
    if max(numbers) >= len(classes):
        raise DataError(
            f"{table} numbers the classes from {min(numbers)} to {max(numbers)}, and train/ has {len(classes)}: number "
            f"them 0 to {len(classes) - 1} in the order of their sorted names, or write the names"
        )
    return {str(number): number for number in range(len(classes))}
