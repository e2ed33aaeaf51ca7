"""Sources given by lists: `train.txt` and `test.txt` with a line `path label` for each image, or one such file.

Samples are ordered as in the list. Labels that are numbers are class numbers, named by `classes.txt` (one name a line)
where there is one; other labels are names, and the classes are sorted by name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from kdfast.data.readers.folders.image_file import SUFFIXES
from kdfast.data.readers.folders.image_split import ImageSplit
from kdfast.data.readers.folders.layout import TEST_NAMES, TRAIN_NAMES
from kdfast.data.readers.folders.pairs import LIST_SUFFIXES, Pair, is_list, read_pairs
from kdfast.data.readers.labels import Classes, find_classes, read_class_names
from kdfast.data.readers.split import SplitRule, train_and_test
from kdfast.data.source import Source, default_view_spec
from kdfast.errors import DataError

_ENDS = ("", "_list", "_labels")


def is_lists(path: Path) -> bool:
    """Return whether `path` is a list, or a folder with a list of training images."""
    return is_list(path) if not path.is_dir() else bool(_find(path, TRAIN_NAMES))


def open_lists(path: Path, size: int | None, split: SplitRule | None = None) -> Source:
    """Open a list, or the lists in a folder.

    Paths in a list are absolute, or relative to the folder of the list, to a folder beside it named like the list or
    `images`, or to the folder above; they may lack the suffix of the image.

    Args:
        path: A list, or a folder with lists named `train` and `test` (or another name of a test split), which may end
            in `_list` or `_labels`.
        size: See `kdfast.data.readers.folders.folder.open_folder`.
        split: How to take the test split from the training images, where there is none.

    Returns:
        The source. Views flip.

    Raises:
        DataError: A list is damaged or names images that are missing, or the labels are no classes.
        UsageError: `split` is given, and there is a test split.
    """
    train_list, test_list = (path, None) if path.is_file() else (_find(path, TRAIN_NAMES)[0], _test_list(path))
    pairs = read_pairs(train_list)
    classes = find_classes([pair.label for pair in pairs], read_class_names(train_list.parent), str(train_list))
    train = _open(train_list, pairs, classes, size)
    test = None if test_list is None else _open(test_list, read_pairs(test_list), classes, size)
    looked_for = f"lists named {', '.join(TEST_NAMES)} with {', '.join(LIST_SUFFIXES)}, in the folder that is the data"
    first, second, notes = train_and_test(train, test, split, str(path), looked_for)
    views = default_view_spec(train.shape, flip=True)
    return Source(str(path), "list", classes.names, first, second, views, notes=notes)


def _find(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """Return the lists in a folder with one of the names, in the order of the names."""
    found = {name.lower(): folder / name for name in sorted(os.listdir(folder), reverse=True)}
    wanted = [name + end + suffix for name in names for end in _ENDS for suffix in LIST_SUFFIXES]
    return [found[name] for name in wanted if name in found and is_list(found[name])]


def _test_list(folder: Path) -> Path | None:
    found = _find(folder, TEST_NAMES)
    return found[0] if found else None


def _open(table: Path, pairs: Sequence[Pair], classes: Classes, size: int | None) -> ImageSplit:
    labels = classes.numbers([pair.label for pair in pairs], str(table))
    return ImageSplit(_locate(table, pairs), labels, size)


def _locate(table: Path, pairs: Sequence[Pair]) -> list[str]:
    """Return the paths of the images; all of a list are relative to the same folder."""
    names = dict.fromkeys((table.stem, table.stem.split("_")[0], "images"))
    bases = [table.parent, *(table.parent / name for name in names), table.parent.parent]
    for base in bases:
        for suffix in ("", *SUFFIXES, *(suffix.upper() for suffix in SUFFIXES)):
            if (base / (pairs[0].path + suffix)).is_file():
                files = [os.path.join(base, pair.path + suffix) for pair in pairs]
                missing = [i for i, file in enumerate(files) if not os.path.isfile(file)]
                if not missing:
                    return files
                pair = pairs[missing[0]]
                raise DataError(
                    f"{table} names {len(missing)} images that are not in {base}, such as {pair.path[:80]} in line "
                    f"{pair.line}: add them or remove the lines"
                )
    looked = ", ".join(str(base) for base in bases)
    raise DataError(
        f"{table}, line {pairs[0].line}: there is no image {pairs[0].path[:80]} (looked in {looked}): correct the path"
    )
