"""Read the lists of image paths and their classes that come with data sets: `path label` lines, .csv and .tsv tables.

| file | a line holds |
|---|---|
| `val_annotations.txt` (Tiny-ImageNet), `.tsv` | path, class and further values, separated by tabs |
| `.csv` | the same, separated by commas; a first line with the names of the columns says which two count |
| `.txt`, `.lst` and others | path and class, separated by a tab, or by the last blank, if the class has none |
"""

from __future__ import annotations

import codecs
import csv
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from kdfast.data.readers.folders.image_file import is_image_name
from kdfast.errors import DataError
from kdfast.files.inputs import MAX_TEXT_BYTES, open_regular, read_bounded

ANNOTATIONS = "val_annotations.txt"
LIST_SUFFIXES = (".txt", ".csv", ".tsv", ".lst")

_PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "img", "image_id", "imageid", "id")
_BOXES = "predictionstring"  # Kaggle's LOC_val_solution.csv: a class and the corners of boxes
_LABELS = ("label", "class", "target", "category", "labels", "class_name", "label_name", _BOXES)
_LOOKED_AT = 1 << 12  # bytes


class Pair(NamedTuple):
    """One line of a list.

    Attributes:
        line: Its number, from 1.
        path: The path of an image, as written.
        label: Its class, as written.
    """

    line: int
    path: str
    label: str


def is_list(path: Path) -> bool:
    """Return whether a file is a list: its first lines hold the name of an image and something after it."""
    if path.suffix.lower() not in LIST_SUFFIXES or not path.is_file():
        return False
    try:
        with open_regular(path) as file:
            lines = _lines(file.read(_LOOKED_AT))[:2]
    except OSError:
        return False
    return any(is_image_name(name) for line in lines for name in _fields(path, line)[:-1]) or bool(
        lines and _columns(_fields(path, lines[0]))
    )


def read_pairs(path: Path) -> list[Pair]:
    """Read a list.

    Returns:
        Its lines in order, without empty ones and the names of columns.

    Raises:
        DataError: The file cannot be read or is empty, or a line has no class or repeats a path.
    """
    try:
        lines = _lines(read_bounded(path, MAX_TEXT_BYTES))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    seen: set[str] = set()
    pairs = list(_parse(path, lines))
    for pair in pairs:
        if pair.path in seen:
            raise DataError(f"{path}, line {pair.line}: {pair.path[:80]} appears twice: remove one of the lines")
        seen.add(pair.path)
    if not pairs:
        raise DataError(f"{path} is empty: write one line `path label` for each image")
    return pairs


def _parse(path: Path, lines: list[str]) -> Iterator[Pair]:
    """Yield the lines that name an image."""
    columns: tuple[int, int] | None = None
    started = boxes = False
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        fields = _fields(path, line)
        if not started:
            started, columns = True, _columns(fields)
            if columns is not None:
                boxes = fields[columns[1]].strip().lower() == _BOXES
                continue
        first, second = columns or (0, 1)
        if len(fields) <= max(first, second):
            fields += [""] * (max(first, second) + 1 - len(fields))
        label = fields[second].strip()
        if not label and path.name != ANNOTATIONS:
            raise DataError(f"{path}, line {number}: {line[:80]!r} has no class: write `path label`")
        yield Pair(number, fields[first].strip(), label.split()[0] if boxes else label)


def _lines(content: bytes) -> list[str]:
    """Return the lines of a text, without the mark that some spreadsheets write before the first."""
    return os.fsdecode(content.removeprefix(codecs.BOM_UTF8)).splitlines()


def _fields(path: Path, line: str) -> list[str]:
    suffix = path.suffix.lower()
    if suffix == ".csv":
        return next(csv.reader([line]), [])
    if suffix == ".tsv" or path.name == ANNOTATIONS:
        return line.split("\t")
    return line.strip().rsplit("\t" if "\t" in line.strip() else None, 1)


def _columns(fields: list[str]) -> tuple[int, int] | None:
    """Return the columns of path and class if the fields are the names of columns."""
    names = [field.strip().lower() for field in fields]
    paths = [names.index(name) for name in _PATHS if name in names]
    labels = [names.index(name) for name in _LABELS if name in names]
    return (paths[0], labels[0]) if paths and labels else None
