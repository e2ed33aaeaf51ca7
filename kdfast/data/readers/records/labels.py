"""Labels as found in files, numbers or names, as class numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kdfast.data.source import infer_class_names
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError

Labels = IntArray | Sequence[str]

_NAMES = ("classnames.txt", "classes.txt")


def class_names(train: Labels, declared: Sequence[str] | None, where: str) -> tuple[str, ...]:
    """Return the names of the classes: those declared, the sorted names among the labels, or numbers.

    Raises:
        DataError: Numbers have a gap or do not start at 0.
    """
    if declared is not None:
        return tuple(declared)
    return infer_class_names(train, where) if isinstance(train, np.ndarray) else tuple(sorted(set(train)))


def as_numbers(labels: Labels, classes: Sequence[str], where: str) -> IntArray:
    """Return labels as class numbers, int64 (N,).

    Raises:
        DataError: A label is the name of no class.
    """
    if isinstance(labels, np.ndarray):
        return labels
    known = {name: number for number, name in enumerate(classes)}
    unknown = next((name for name in labels if name not in known), None)
    if unknown is not None:
        raise DataError(f"{where} has the class {unknown[:80]!r}, which the training images lack: remove those images")
    return np.array([known[name] for name in labels], np.int64)


def numbers_or_names(texts: Sequence[str]) -> Labels:
    """Return texts as numbers if all are whole numbers, else as they are."""
    if all(text.isdecimal() and len(text) < 10 for text in texts):
        return np.array([int(text) for text in texts], np.int64)
    return texts


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the lines of the `classnames.txt` or `classes.txt` in a folder, or None without one."""
    for name in _NAMES:
        if (folder / name).is_file():
            lines = os.fsdecode((folder / name).read_bytes()).splitlines()
            return tuple(line.strip() for line in lines if line.strip())
    return None
