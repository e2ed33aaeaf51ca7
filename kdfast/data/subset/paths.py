"""Find samples by the paths of their files, as lists of public code name them."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Sequence

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError, KdfastError

_SEVERAL = -1
_TEST_SPLITS = ("test", "val", "valid", "validation", "testing", "eval")


def _index(names: Sequence[str]) -> dict[str, int]:
    """Return where each name is, or that it is several times."""
    found: dict[str, int] = {}
    for index, name in enumerate(names):
        found[name] = _SEVERAL if name in found else index
    return found


def _composed(text: str) -> str:
    """Return a name with one code point for a letter and its accent: macOS writes two where others write one."""
    return unicodedata.normalize("NFC", text)


class SamplePaths:
    """Finds samples by the ends of their paths.

    A path is found if it is `class/file.JPEG`, with any folders before it but that of a test split, or the name of a
    file that only one class has.

    Args:
        files: The path of each sample's file.
    """

    def __init__(self, files: Sequence[str]) -> None:
        if len({os.path.isabs(file) for file in files}) > 1:
            files = [os.path.abspath(file) for file in files]
        files = [_composed(file) for file in files]
        root = os.path.dirname(files[0]) if len(files) == 1 else os.path.commonpath(files)
        self._root = os.path.basename(root).lower()
        self._count = len(files)
        self._by_path = _index([os.path.relpath(file, root) for file in files])
        self._by_name = _index([os.path.basename(file) for file in files])
        self._example = os.path.relpath(files[0], root)

    def covers(self, paths: Sequence[str]) -> list[bool] | None:
        """Return which paths are of samples, if each sample has exactly one; otherwise None."""
        found = [self.look_up(path) for path in paths]
        known = sorted(index for index in found if index is not None)
        return [index is not None for index in found] if known == list(range(self._count)) else None

    def find(self, paths: Sequence[str], what: str, error: type[KdfastError] = DataError) -> IntArray:
        """Return the sample of each path, int64 (n,).

        Args:
            paths: The paths. What follows a space, such as a label, is ignored where the whole is no path.
            what: The file that names them, for messages.
            error: The error to raise.

        Raises:
            KdfastError: Of type `error`, if a path is none of a sample, or a name that several samples have.
        """
        found = [self.look_up(path) for path in paths]
        missing = [path for path, index in zip(paths, found, strict=True) if index is None]
        if missing:
            raise error(
                f"{what} names {len(missing)} of {len(paths)} files that this data does not have, such as "
                f"{missing[0][:200]}: write paths such as {self._example}"
            )
        several = [path for path, index in zip(paths, found, strict=True) if index == _SEVERAL]
        if several:
            raise error(
                f"{what} names {several[0][:200]}, which several samples are called: write paths such as "
                f"{self._example}"
            )
        return np.array(found, np.int64)

    def look_up(self, text: str) -> int | None:
        """Return the sample of a path with or without a label behind it; -1 for several, None for none."""
        text = _composed(text)
        for path in (text, *text.rsplit(maxsplit=1)[:1], *text.rsplit(",", 1)[:1]):
            index = self._look_up(path)
            if index is not None:
                return index
        return None

    def _look_up(self, path: str) -> int | None:
        parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".")]
        for start in range(len(parts)):
            index = self._by_path.get("/".join(parts[start:]))
            if index is not None:
                above = parts[start - 1].lower() if start else ""
                return None if above in _TEST_SPLITS and above != self._root else index
        return self._by_name.get(parts[0]) if len(parts) == 1 else None
