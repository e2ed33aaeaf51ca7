"""Read the files in which people keep a subset, as they are: an array of indices or a mask, or paths."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.subset.tables import Table, as_index, parse_indices, read_lines, read_table
from kdfast.errors import SubsetError
from kdfast.files.arrays import read_npy
from kdfast.files.pickles import read_pickle

Array = npt.NDArray[Any]

_TABLES = (".csv", ".tsv")
_PICKLES = (".pt", ".pth", ".pkl", ".pickle")
_LISTS = (".txt", ".lst", ".list")
# Keys that hold the kept indices where a file holds more, as those of DeepCore do.
_KEYS = ("indices", "index", "idx", "ids", "subset", "coreset", "coreset_index", "mask")

# Columns of a table that choose among its rows.
_CHOICES = ("keep", "kept", "selected", "select", "mask", "in_subset", "included", "include", "use", "used")


def load_subset(file: Path) -> Array | list[str]:
    """Return what a file holds: an array, or paths.

    Args:
        file: A .csv or .tsv file with a column index or path; a .txt, .lst or .list file with one sample a line; a
            file of torch.save or a pickle (.pt, .pth, .pkl, .pickle); otherwise a .npy file.

    Raises:
        SubsetError: The file is missing, damaged, or of another kind.
    """
    suffix = file.suffix.lower()
    if suffix in _TABLES:
        table = read_table(file, error=SubsetError)
        _check_says_no_more(table, file)
        return table.rows
    if suffix in _LISTS:
        lines = read_lines(file, error=SubsetError)
        is_list_of_indices = as_index(lines[0].split()[0]) is not None
        return parse_indices(lines, str(file), SubsetError) if is_list_of_indices else lines
    if suffix in _PICKLES:
        return _choose(read_pickle(file, error=SubsetError), file)
    if file.is_file() and zipfile.is_zipfile(file):
        raise SubsetError(
            f"{file} is a zip archive, as np.savez and torch.save write: load the indices, and write them alone with "
            "np.save(path, ids)"
        )
    return read_npy(file, error=SubsetError, advice="pickles are not read; write it with np.save(path, ids)")


def _check_says_no_more(table: Table, file: Path) -> None:
    """Refuse a table whose rows are not all to be kept, by the name of a column."""
    for name in table.columns:
        if name.lower() in _CHOICES:
            raise SubsetError(
                f"{file} has the column {name}: either it says which rows to keep, or all of them are kept; write the "
                f"rows to keep, without {name}"
            )


def _choose(content: Any, file: Path) -> Array | list[str]:
    """Return the indices or paths among the values of a pickle."""
    if isinstance(content, Mapping):
        found = {name: value for name, value in _flatten(content).items() if name.rpartition(".")[2] in _KEYS}
        if len(found) != 1:
            held = ", ".join(_flatten(content)) or "nothing"
            raise SubsetError(
                f"{file} holds {held[:200]}, and {'none' if not found else 'more than one'} of these is called "
                f"{', '.join(_KEYS)}: write the indices alone with np.save(path, ids)"
            )
        content = next(iter(found.values()))
    if isinstance(content, (list, tuple)) and content and all(isinstance(value, str) for value in content):
        return list(content)
    try:
        return np.asarray(content)
    except ValueError as exc:
        raise SubsetError(f"{file} holds no array of indices ({exc}): write it with np.save(path, ids)") from exc


def _flatten(content: Mapping[Any, Any], start: str = "") -> dict[str, Any]:
    """Return the values of nested dicts by their keys, joined with dots."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        name = f"{start}{key}"
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{name}.")
        else:
            flat[name] = value
    return flat
