"""Labels as found in files, numbers or names, as class numbers."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kdfast.data.source import infer_class_names
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError
from kdfast.files.inputs import MAX_TEXT_BYTES, read_bounded

Labels = IntArray | Sequence[str]

_FILES = ("classes.txt", "classnames.txt")
_MAX_DIGITS = 9


@dataclass(frozen=True)
class Classes:
    """The classes of a data set, and whether its labels are their numbers or their names.

    Attributes:
        names: The name of each class.
        numbered: Whether labels are numbers.
    """

    names: tuple[str, ...]
    numbered: bool

    def numbers(self, labels: Labels, where: str) -> IntArray:
        """Return labels as class numbers, int64 (N,).

        Args:
            labels: Numbers, or texts that are numbers or names as those of the training images.
            where: Their place, for messages.

        Raises:
            DataError: A label is the name of no class.
        """
        if isinstance(labels, np.ndarray) and self.numbered:
            return labels
        known = {str(n) if self.numbered else name: n for n, name in enumerate(self.names)}
        texts = [str(label) for label in labels]
        unknown = next((text for text in texts if text not in known), None)
        if unknown is not None:
            raise DataError(
                f"{where} has the label {unknown[:80]!r}, and the classes are {_ends(list(known))}: correct it, or "
                "remove that image"
            )
        return np.array([known[text] for text in texts], np.int64)


def find_classes(train: Labels, declared: Sequence[str] | None, where: str) -> Classes:
    """Return the classes of a data set.

    Args:
        train: Labels of the training images. Texts are numbers if all are whole numbers, unless these are names of
            classes.
        declared: Names that the data set declares, or None: numbers then name themselves, and names are sorted.
        where: The data, for messages.

    Raises:
        DataError: Numbers have a gap or do not start at 0.
    """
    if not isinstance(train, np.ndarray):
        if not all(text.isdecimal() and len(text) <= _MAX_DIGITS for text in train) or set(train) & set(declared or ()):
            return Classes(tuple(declared or sorted(set(train))), numbered=False)
        train = np.array([int(text) for text in train], np.int64)
    return Classes(tuple(declared or infer_class_names(train, where)), numbered=True)


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Return the lines of the `classes.txt` or `classnames.txt` in a folder, or None without one.

    Raises:
        DataError: The file cannot be read.
    """
    for name in _FILES:
        if (folder / name).is_file():
            try:
                lines = os.fsdecode(read_bounded(folder / name, MAX_TEXT_BYTES)).splitlines()
            except OSError as error:
                raise DataError(f"cannot read {folder / name}: {error.strerror or error}") from error
            return tuple(line.strip() for line in lines if line.strip()) or None
    return None


def _ends(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 6 else f"{names[0]}, {names[1]}, ..., {names[-1]}"
