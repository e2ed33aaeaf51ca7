"""The formats of scores: each reader returns every array that may be the scores, and which samples they are about."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.subset.tables import as_index, as_number, parse_indices, read_lines, read_table
from kdfast.errors import DataError
from kdfast.files.arrays import read_npy, read_npz
from kdfast.files.pickles import read_pickle

Array = npt.NDArray[Any]

_MAX_BYTES = 1 << 30  # of one array: 134 million scores
_DEPTH = 4  # of nested dicts


@dataclass(frozen=True)
class Found:
    """What a file holds.

    Attributes:
        arrays: Arrays by key; the key of an array without one is empty.
        rows: Which sample each value is about: int64 indices or paths; None: the samples in order.
        by: How the values belong to samples, for people.
    """

    arrays: dict[str, Array]
    rows: npt.NDArray[np.int64] | list[str] | None = None
    by: str = "one score for each sample, in order"


def _load_npy(file: Path) -> Found:
    return Found({"": read_npy(file, advice="write the scores with np.save(path, scores)")})


def _load_npz(file: Path) -> Found:
    return Found(read_npz(file, member_bytes=_MAX_BYTES, advice="write the scores with np.savez(path, scores=scores)"))


def _load_pickle(file: Path) -> Found:
    return Found(_arrays_of(read_pickle(file)))


def _arrays_of(content: Any, key: str = "", depth: int = _DEPTH) -> dict[str, Array]:
    """Return the arrays and lists of numbers in nested dicts by their keys, joined with dots."""
    if isinstance(content, Mapping):
        if depth == 0:
            return {}
        pairs = [(f"{key}.{name}" if key else str(name), value) for name, value in content.items()]
        return {name: array for start, value in pairs for name, array in _arrays_of(value, start, depth - 1).items()}
    if isinstance(content, (list, tuple)) and all(isinstance(value, (int, float, np.number)) for value in content):
        content = np.array(content)
    return {key: content} if isinstance(content, np.ndarray) and content.ndim else {}


def _load_table(file: Path) -> Found:
    table = read_table(file)
    arrays = {}
    for name, texts in table.columns.items():
        numbers = [as_number(text) for text in texts]
        if None not in numbers:
            arrays[name] = np.array(numbers, np.float64)
    if not arrays:
        held = ", ".join(f"{name} with {texts[0][:60]!r}" for name, texts in list(table.columns.items())[:20])
        raise DataError(f"{file} has no column of numbers beside {table.by or 'the index'}, but {held or 'none'}")
    by = f"the column {table.by}" if table.by else "the index in the first column"
    return Found(arrays, table.rows, f"scores by {by}")


def _load_list(file: Path) -> Found:
    """Read a list of numbers, or of indices or paths with a number behind each."""
    lines = read_lines(file)
    numbers = [as_number(line) for line in lines]
    if None not in numbers:
        return Found({"": np.array(numbers, np.float64)})
    pairs = [line.replace(",", " ").rsplit(maxsplit=1) for line in lines]
    values = [as_number(pair[-1]) if len(pair) == 2 else None for pair in pairs]
    if None in values:
        raise DataError(
            f"{file} has the line {lines[values.index(None)][:200]!r}, which does not end in a number: write one score "
            "on each line, or an index or path and its score; a list of paths alone is a subset"
        )
    samples = [pair[0] for pair in pairs]
    if all(as_index(sample) is not None for sample in samples):
        return Found({"": np.array(values, np.float64)}, parse_indices(samples, str(file)), "scores by index")
    return Found({"": np.array(values, np.float64)}, samples, "scores by path")


LOADERS: dict[str, Callable[[Path], Found]] = {
    ".npy": _load_npy,
    ".npz": _load_npz,
    **dict.fromkeys((".pt", ".pth", ".pkl", ".pickle"), _load_pickle),
    **dict.fromkeys((".csv", ".tsv"), _load_table),
    **dict.fromkeys((".txt", ".lst", ".list"), _load_list),
}
"""Suffix of a file -> reader."""


def can_read(path: str | os.PathLike[str]) -> bool:
    """Return whether files of this name can be read."""
    return Path(path).suffix.lower() in LOADERS
