"""List the image files of a folder, in a defined order, and say what was left out.

Links to folders are followed. Hidden files and folders (`._0.png`, `.ipynb_checkpoints`) hold copies and thumbnails,
and are left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from kdfast.data.readers.folders.image_file import is_image_name
from kdfast.errors import DataError
from kdfast.text import counted

ORDERS = ("path", "imagefolder")

_MAX_REPEATS = 10_000  # folders reached by several ways; links between n folders make n! ways
_LISTED = 8


class ImageLister:
    """Lists the images of the folders of one split, and counts what is left out.

    Args:
        root: The folder of the split, for messages.
        order: Of the files of a folder. "path": sorted by path, name by name. "imagefolder": as torchvision's
            ImageFolder, sorted by the path of their folder, then by name.
        known: Names of other files, which are not counted.
    """

    def __init__(self, root: Path, order: str, known: tuple[str, ...] = ()) -> None:
        self._root = root
        self._order = order
        self._known = known
        self._others: Counter[str] = Counter()  # by suffix
        self._hidden: list[str] = []
        self._circles: list[str] = []
        self._loose: list[str] = []
        real = Path(os.path.realpath(root))
        self._above = {_identity(str(folder)) for folder in (real, *real.parents)}

    def class_folders(self) -> tuple[str, ...]:
        """Return the names of the sub-folders of the split that are not hidden, sorted."""
        names = []
        for entry in _entries(str(self._root)):
            if entry.name.startswith("."):
                self._add_hidden(entry)
            elif is_directory(entry):
                if entry.is_symlink() and _identity(entry.path) in self._above:
                    self._circles.append(entry.path)
                else:
                    names.append(entry.name)
            elif is_image_name(entry.name):
                self._loose.append(entry.path)
        return tuple(names)

    def list_images(self, folder: Path) -> list[str]:
        """Return the paths of the images in a folder at any depth.

        Raises:
            DataError: A folder cannot be listed, or links lead to the same folders in too many ways.
        """
        if self._order == "path":
            return [entry.path for entry in self._walk(str(folder))]
        by_folder: dict[str, list[str]] = {}
        for entry in self._walk(str(folder)):
            by_folder.setdefault(os.path.dirname(entry.path), []).append(entry.path)
        return [path for _, paths in sorted(by_folder.items()) for path in paths]

    def notes(self) -> tuple[str, ...]:
        """Return one sentence for each kind of file that was left out."""
        notes = []
        if self._others:
            kinds = [f"{count} {suffix or 'without any suffix'}" for suffix, count in self._others.most_common(_LISTED)]
            more = ", ..." * (len(self._others) > _LISTED)
            notes.append(
                f"skipped {counted(self._others.total(), 'file')} without the suffix of an image: "
                f"{', '.join(kinds)}{more}"
            )
        for paths, noun, where in (
            (self._hidden, "image", "in hidden files and folders"),
            (self._loose, "image", "outside of class folders"),
            (self._circles, "link", "to folders that contain them"),
        ):
            if paths:
                notes.append(f"skipped {counted(len(paths), noun)} {where}, such as {paths[0]}")
        return tuple(f"{self._root}: {note}" for note in notes)

    def _walk(self, folder: str) -> Iterator[os.DirEntry[str]]:
        """Yield the image files of a folder, sorted by path, name by name."""
        # Each level: the folder's identity, and its entries that are still to come. Recursion could be too deep.
        levels = [(_identity(folder), iter(_entries(folder)))]
        seen: set[tuple[int, int]] = set()
        repeats = 0
        while levels:
            entry = next(levels[-1][1], None)
            if entry is None:
                levels.pop()
            elif entry.name.startswith("."):
                self._add_hidden(entry)
            elif not is_directory(entry):
                if is_image_name(entry.name):
                    yield entry
                elif entry.name not in self._known:
                    self._others[os.path.splitext(entry.name)[1].lower()] += 1
            elif (identity := _identity(entry.path)) in self._above or identity in (level[0] for level in levels):
                self._circles.append(entry.path)
            else:
                repeats += identity in seen
                seen.add(identity)
                if repeats > _MAX_REPEATS:
                    raise DataError(f"{folder} has links that lead to its folders in too many ways: remove some")
                levels.append((identity, iter(_entries(entry.path))))

    def _add_hidden(self, entry: os.DirEntry[str]) -> None:
        if entry.is_dir(follow_symlinks=False):
            for parent, _, names in os.walk(entry.path):
                self._hidden += [os.path.join(parent, name) for name in names if is_image_name(name)]
        elif is_image_name(entry.name):
            self._hidden.append(entry.path)


def _entries(folder: str) -> list[os.DirEntry[str]]:
    """Return the entries of a folder, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror or error}") from error


def is_directory(entry: os.DirEntry[str]) -> bool:
    """Return whether an entry is a folder or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where nothing can be looked up
        return False


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise DataError(f"cannot list {folder}: {error.strerror or error}") from error
    return status.st_dev, status.st_ino
