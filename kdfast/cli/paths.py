"""Checks of the paths on a command line, the same for every command, before anything is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kdfast.errors import OutputError, UsageError

# Metavariables of the parameters that are paths but arrive as text, and of NAME=FILE.
_TEXT_PATHS = ("PATH", "<path>")
_NAMED_FILE = "NAME=FILE"
# Parameters that are sources of data, and the source that is a word and no path.
_DATA = ("data", "src")
_NO_PATH = "digits"
# Sub-folders of image folders; a folder in one of them is a class, or part of one.
_IMAGE_TREES = ("train", "test", "val")

# Bytes; Linux has 255 and 4095. Outputs leave room for the names of files beside and below them.
_NAME_BYTES, _PATH_BYTES = 255, 4095
_ROOM_IN_NAME, _ROOM_IN_PATH = 15, 200


def check_current_folder() -> None:
    """Check that the current folder exists: without it no relative path does, and libraries of torch end the process.

    Raises:
        UsageError: It was deleted, or must not be searched.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise UsageError(
            f"the current folder cannot be used ({error.strerror}): change to another one with cd, as it may have been "
            "deleted"
        ) from error


def check_words(words: Iterable[str]) -> None:
    """Check that no word of a command line is empty: an empty path would mean the current folder.

    Raises:
        UsageError: A word or the value of an option is empty.
    """
    before = "an argument"
    for word in words:
        option, equals, value = word.partition("=")
        if not word or (word.startswith("--") and equals and not value):
            raise UsageError(f"{option or before} is empty: pass a value")
        before = word if word.startswith("-") else "an argument"


def check_paths(parameters: Iterable[Any], values: Mapping[str, Any]) -> None:
    """Check the paths of a command.

    Args:
        parameters: The command's parameters.
        values: Their values by name.

    Raises:
        UsageError: A path is too long.
        OutputError: The output is also an input, or lies among the images of one.
    """
    paths = {p.name: list(_paths_of(p, values.get(p.name))) for p in parameters}
    for name, given in paths.items():
        for path in given:
            _check_length(name, path, is_output=name == "out")
    for out in paths.pop("out", []):
        for name, given in paths.items():
            for path in given:
                _check_apart(out, name, path)


def shorten_path(path: object) -> str:
    """Return a path for a message, cut to its first characters if it is very long."""
    text = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else str(path)
    return text if len(text) <= 100 else f"{text[:60]}... ({len(text)} characters)"


def _paths_of(parameter: Any, value: Any) -> Iterator[Path]:
    """Yield the paths among the values of a parameter."""
    metavar = getattr(parameter, "metavar", None)
    for one in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(one, Path):
            yield one
        elif isinstance(one, str) and (metavar in _TEXT_PATHS or parameter.name in _DATA) and one != _NO_PATH:
            yield Path(one)
        elif isinstance(one, str) and metavar == _NAMED_FILE:
            yield Path(one.partition("=")[2])


def _check_length(name: str, path: Path, *, is_output: bool) -> None:
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    total = len(os.fsencode(path.absolute()))
    part_limit = _NAME_BYTES - _ROOM_IN_NAME * is_output
    path_limit = _PATH_BYTES - _ROOM_IN_PATH * is_output
    if longest > part_limit or total > path_limit:
        raise UsageError(
            f"`{name}` is {shorten_path(path)}, with {total} bytes and up to {longest} in a name: use at most "
            f"{path_limit} and {part_limit}"
        )


def _check_apart(out: Path, name: str, path: Path) -> None:
    if _is_same(out, path):
        raise OutputError(f"`out` is {out}, which is also `{name}`: write to another path")
    real = Path(os.path.realpath(out))
    for tree in _IMAGE_TREES if name in _DATA else ():
        folder = Path(os.path.realpath(path / tree))
        if folder.is_dir() and real.is_relative_to(folder):
            raise OutputError(f"`out` is {out}, which is among the images of {path}: write to another folder")


def _is_same(first: Path, second: Path) -> bool:
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):  # one of them does not exist
        return False
