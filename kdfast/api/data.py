"""Open data, and check what callers pass with it."""

from __future__ import annotations

import operator
import os
from pathlib import Path
from typing import Any

from kdfast.data.readers.datasets import IndexedDataset, from_datasets
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import UsageError
from kdfast.teacher.cache import TeacherCache


def open_data(
    data: str | os.PathLike[str] | tuple[IndexedDataset, IndexedDataset],
    *,
    size: int | None = None,
    order: str = "path",
    split: str | None = None,
) -> Source:
    """Open data.

    Args:
        data: A path of one of the kinds in `kdfast.data.readers.registry.SOURCES`, or `digits`; or two indexed data
            sets, for training and for testing, see `kdfast.from_datasets`.
        size: For image folders: side of the stored images in pixels.
        order: For image folders: order of the samples of a class with sub-folders.
        split: The test split of data that has none, see `kdfast.data.readers.registry.open_source`.

    Returns:
        The data: `train` and `test` with `labels` and `read(ids)`, and the names of its `classes`.

    Raises:
        DataError: There is no such data, or it is damaged.
        UsageError: An option does not fit the data.
    """
    if isinstance(data, tuple) and len(data) == 2:
        return from_datasets(*data)
    if not isinstance(data, (str, os.PathLike)):
        raise UsageError(f"`data` is a {type(data).__name__}: pass a path, or two data sets, (train, test)")
    return open_source(data, size=size, order=order, split=split)


def check_opened(data: Any) -> None:
    """Check that data is open.

    Raises:
        UsageError: It is a path or something else.
    """
    if not isinstance(data, Source):
        shown = repr(str(data)) if isinstance(data, (str, os.PathLike)) else f"a {type(data).__name__}"
        raise UsageError(f"`data` is {shown}: open it first, with kdfast.open_data")


def folder_of(opened: TeacherCache | Dynamics | str | os.PathLike[str] | None) -> Path | None:
    """Return the folder of a cache or of dynamics that are open, or given as a path; None for none."""
    if opened is None or isinstance(opened, (str, os.PathLike)):
        return None if opened is None else Path(opened)
    return opened.path


def as_integer(name: str, value: Any) -> int:
    """Return an integer of any type, such as one of numpy, as an int.

    Raises:
        UsageError: The argument `name` is no integer.
    """
    try:
        return operator.index(value)
    except TypeError as error:
        raise UsageError(f"`{name}` is {value!r}: pass an integer") from error
