"""Open data."""

from __future__ import annotations

import os

from kdfast.data.readers.datasets import IndexedDataset, from_datasets
from kdfast.data.readers.registry import open_source
from kdfast.data.source import Source


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
    if isinstance(data, tuple):
        return from_datasets(*data)
    return open_source(data, size=size, order=order, split=split)
