"""Find which files of a folder belong to which split, by the names of files and folders."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from kdfast.data.readers.folders.layout import TEST_NAMES, TRAIN_NAMES

_WORD = re.compile(r"[-_.]")
_NUMBER = re.compile(r"(\d+)")


def find_splits(path: Path, suffix: str) -> dict[str, list[str]]:
    """Return the files of each split of a data set, by the name of the split.

    A file belongs to the split that its name contains as a word (`train-00000-of-00002.parquet`), or in whose folder it
    lies (`train/0000.tar`). If no file does, all belong to the training split. The files lie in the folder, in its
    sub-folder `data`, or in its only visible sub-folder.

    Args:
        path: A file or folder.
        suffix: The end of the names of files, in lower case.

    Returns:
        Paths by split, those with numbers in numerical order; empty without such files.
    """
    if path.is_file():
        return {"train": [str(path)]} if path.name.lower().endswith(suffix) else {}
    if not path.is_dir():
        return {}
    children = [name for name in sorted(os.listdir(path)) if not name.startswith(".") and (path / name).is_dir()]
    inner = ["data"] if "data" in children else children if len(children) == 1 else []
    for base in (path, *(path / name for name in inner)):
        if found := _splits_in(base, suffix):
            return found
    return {}


def named(splits: dict[str, list[str]], names: Sequence[str]) -> list[str]:
    """Return those of some names of splits that exist, in the order of the names."""
    return [name for name in names if name in splits]


def _splits_in(base: Path, suffix: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    plain = []
    for file in _files(base, suffix):
        split = _split_of(os.path.basename(file)[: -len(suffix)])
        plain.append(file) if split is None else found.setdefault(split, []).append(file)
    for name in sorted(os.listdir(base)):
        folder = base / name
        if name.lower() in TRAIN_NAMES + TEST_NAMES and folder.is_dir() and (files := _files(folder, suffix)):
            found.setdefault(name.lower(), []).extend(files)
    return found or ({"train": plain} if plain else {})


def _files(folder: Path, suffix: str) -> list[str]:
    names = [name for name in os.listdir(folder) if name.lower().endswith(suffix) and not name.startswith(".")]
    return [str(folder / name) for name in sorted(names, key=_natural) if (folder / name).is_file()]


def _natural(name: str) -> list[tuple[int, str]]:
    """Return the key by which 2 comes before 10."""
    parts = _NUMBER.split(name)
    return [(int(part), "") if index % 2 else (0, part) for index, part in enumerate(parts)]


def _split_of(stem: str) -> str | None:
    words = [word.lower() for word in _WORD.split(stem)]
    found = {word for word in words if word in TRAIN_NAMES + TEST_NAMES}
    return found.pop() if len(found) == 1 else None
