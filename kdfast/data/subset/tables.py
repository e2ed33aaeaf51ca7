"""Text files that name samples: lists, one sample a line, and .csv files with a header."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kdfast.errors import DataError, KdfastError
from kdfast.files.inputs import MAX_TABLE_BYTES, read_bounded

# Names of the column that says which sample a row is about. pandas leaves that of its index empty.
INDEX_NAMES = ("index", "idx", "id", "sample_id", "sample_index", "sample")
PATH_NAMES = ("path", "file", "filename", "file_name", "image", "image_path", "img")
_PANDAS_INDEX = ""
_MAX_INDEX = 1 << 62


@dataclass(frozen=True)
class Table:
    """A .csv file.

    Attributes:
        rows: Which sample each row is about: int64 (n,), or paths.
        columns: The texts of the other columns by name.
        by: The name of the column that `rows` comes from.
    """

    rows: npt.NDArray[np.int64] | list[str]
    columns: dict[str, list[str]]
    by: str


def read_lines(path: str | os.PathLike[str], *, error: type[KdfastError] = DataError) -> list[str]:
    """Return the lines of a text file that are not empty, without the space around them.

    Names that are not UTF-8 are decoded as Python decodes names of files.

    Raises:
        KdfastError: Of type `error`, if the file is missing, no text file, or has no lines.
    """
    try:
        raw = read_bounded(path, MAX_TABLE_BYTES)
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror or exc}") from exc
    if b"\0" in raw:
        raise error(f"{path} is not a text file: write one sample on each line")
    # Not splitlines, which also splits at characters that names of files may hold.
    lines = [line.strip(" \r") for line in os.fsdecode(raw.removeprefix(b"\xef\xbb\xbf")).split("\n")]
    if not any(lines):
        raise error(f"{path} is empty: write one sample on each line")
    return [line for line in lines if line]


def read_table(path: str | os.PathLike[str], *, error: type[KdfastError] = DataError) -> Table:
    """Read a .csv file whose first line names its columns, separated by commas or else semicolons, or a .tsv file.

    Raises:
        KdfastError: Of type `error`, if the file cannot be read, a row has another number of fields than the header,
            two columns have the same name, none or two say which sample a row is about, or an index is no whole number.
    """
    lines = read_lines(path, error=error)
    delimiter = "\t" if os.fspath(path).endswith(".tsv") else "," if "," in lines[0] or ";" not in lines[0] else ";"
    try:
        records = list(csv.reader(lines, delimiter=delimiter))
    except csv.Error as exc:
        raise error(f"{path} is not a .csv file ({exc}): write a header, then one row for each sample") from exc
    header, rows = [name.strip() for name in records[0]], records[1:]
    if not rows:
        raise error(f"{path} has a header and no rows: write one row for each sample")
    for number, row in enumerate(rows, 2):
        if len(row) != len(header):
            raise error(f"{path}, row {number}, has {len(row)} fields, the header has {len(header)}: correct the row")
    if len(set(header)) < len(header):
        raise error(f"{path} has two columns of the same name, in {', '.join(header)}: rename one")
    columns = {name: [row[i].strip() for row in rows] for i, name in enumerate(header)}
    names = {name.lower(): name for name in header}
    by = next((names[name] for name in (*INDEX_NAMES, *PATH_NAMES, _PANDAS_INDEX) if name in names), None)
    if by is None:
        raise error(
            f"{path} has the columns {', '.join(header)}, and none says which sample a row is about: name one index "
            "(0 is the first sample) or path"
        )
    column = next((names[name] for name in PATH_NAMES if name in names), by)
    if by and column != by:
        raise error(
            f"{path} has the columns {by} and {column}, and either may say which sample a row is about: delete {by} if "
            f"it only numbers the rows, or else {column}"
        )
    samples = columns.pop(by)
    if by.lower() in PATH_NAMES:
        return Table(samples, columns, by)
    return Table(parse_indices(samples, f"{path}, column {by or 'without a name'},", error), columns, by)


def parse_indices(texts: Sequence[str], what: str, error: type[KdfastError] = DataError) -> npt.NDArray[np.int64]:
    """Return whole numbers, also those that numpy.savetxt writes as 3.0e+00, as int64 (n,).

    Raises:
        KdfastError: Of type `error`, if one is no whole number, or too large for an index.
    """
    values = np.empty(len(texts), np.int64)
    for row, text in enumerate(texts):
        value = as_index(text)
        if value is None:
            raise error(f"{what} holds {text[:60]!r}, which is no index: write whole numbers, 0 for the first sample")
        values[row] = value
    return values


def as_index(text: str) -> int | None:
    """Return a text as a whole number; None if it is none, or too large for an index."""
    try:
        value = int(text) if text.lstrip("+-").isdecimal() else float(text)
    except ValueError:
        return None
    return int(value) if abs(value) < _MAX_INDEX and value == int(value) else None


def as_number(text: str) -> float | None:
    """Return a text as a number; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None
