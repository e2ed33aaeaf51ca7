"""Parquet and Arrow tables of encoded images, as Hugging Face Datasets stores them.

This is the only file that imports pyarrow, and it does so on first use. Arrow files are mapped into memory; Parquet
files are read into it, still encoded.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kdfast.data.readers.datasets import IMAGE_KEYS, LABEL_KEYS
from kdfast.data.readers.folders.image_file import Encoded
from kdfast.data.readers.folders.image_split import ImageSplit
from kdfast.data.readers.folders.layout import TEST_NAMES, TRAIN_NAMES
from kdfast.data.readers.labels import Labels, find_classes
from kdfast.data.readers.records.splits import find_splits, named
from kdfast.data.readers.split import SplitRule, train_and_test
from kdfast.data.source import Source, default_view_spec
from kdfast.errors import BackendUnavailable, DataError
from kdfast.files import read_json
from kdfast.files.inputs import MAX_IMAGE_BYTES, available_memory, open_regular

_SUFFIXES = (".parquet", ".arrow")
_DICT = "dataset_dict.json"  # written by DatasetDict.save_to_disk
_INSTALL = "reading Parquet and Arrow files needs pyarrow: run pip install pyarrow"
_OTHER = "or open it with the datasets package and pass it to from_datasets"


def is_tables(path: Path) -> bool:
    """Return whether `path` is a Parquet or Arrow file, or a folder of such files."""
    return bool(_find(path))


def open_tables(path: Path, size: int | None, split: SplitRule | None = None) -> Source:
    """Open Parquet or Arrow files.

    The image column is the one declared as an image, or one of the usual names; the label column likewise. Of several
    label columns the one with the most classes counts.

    Args:
        path: A file; a folder with files named by split; or a folder that `save_to_disk` wrote.
        size: See `kdfast.data.readers.folders.folder.open_folder`.
        split: How to take the test split from the training images, where there is none.

    Returns:
        The source, samples in the order of the rows. Views below 64 pixels do not flip.

    Raises:
        BackendUnavailable: pyarrow is not installed.
        DataError: A file is damaged, has no image or label column, or takes too much memory.
        UsageError: `split` is given, and there is a test split.
    """
    files = _find(path)
    train_names = named(files, TRAIN_NAMES)
    if not train_names:
        raise DataError(f"{path} has the splits {', '.join(files)}, none of them train: add the training images")
    table = _read(files[train_names[0]])
    columns = _choose_columns(table, path)
    labels = _labels(table, columns, str(path))
    classes = find_classes(labels, columns.classes, str(path))
    train = ImageSplit(
        _Images(table, columns, files[train_names[0]]),
        classes.numbers(labels, str(path)),
        size,
        files[train_names[0]],
    )
    notes = list(columns.notes)
    test = None
    for name in named(files, TEST_NAMES):
        other = _read(files[name])
        found = _labels(other, columns, f"{path} ({name})")
        if isinstance(found, np.ndarray) and found.size and found.min() < 0:
            notes.append(f"{path}: the split {name} has no labels and is skipped")
            continue
        numbers = classes.numbers(found, f"{path} ({name})")
        test = ImageSplit(_Images(other, columns, files[name]), numbers, size, files[name])
        break
    looked_for = f"splits named {', '.join(TEST_NAMES)}"
    first, second, decided = train_and_test(train, test, split, str(path), looked_for)
    views = default_view_spec(train.shape, flip=False)
    return Source(str(path), "table", classes.names, first, second, views, notes=(*notes, *decided))


class _Columns(NamedTuple):
    """The columns that count."""

    image: str
    label: str
    classes: tuple[str, ...] | None
    notes: tuple[str, ...]


class _Images(Sequence[Encoded]):
    """The images of a table, found by their row without a copy."""

    def __init__(self, table: Any, columns: _Columns, files: list[str]) -> None:
        self._chunks = table.column(columns.image).chunks
        self._starts = np.cumsum([0, *(len(chunk) for chunk in self._chunks)])
        self._name = files[0] if len(files) == 1 else os.path.dirname(files[0])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Any) -> Any:
        return Encoded(f"{self._name}, row {int(row)}", functools.partial(self._read, int(row)))

    def _read(self, row: int) -> bytes | memoryview:
        place = int(np.searchsorted(self._starts, row, side="right")) - 1
        chunk, index = self._chunks[place], row - int(self._starts[place])
        path = None
        if hasattr(chunk, "field"):  # a struct of bytes and path
            names = [field.name for field in chunk.type]
            path = chunk.field("path")[index].as_py() if "path" in names else None
            chunk = chunk.field("bytes")
        value = chunk[index]
        if value.is_valid:
            return memoryview(value.as_buffer())
        if path is None:
            raise ValueError("it is empty")
        with open_regular(os.path.join(os.path.dirname(self._name), path), MAX_IMAGE_BYTES) as file:
            return file.read()


def _find(path: Path) -> dict[str, list[str]]:
    """Return the files of each split."""
    if path.is_dir() and (path / _DICT).is_file():
        splits = read_json(path / _DICT).get("splits", [])
        return {name: files for name in splits if (files := find_splits(path / str(name), ".arrow").get("train", []))}
    for suffix in _SUFFIXES:
        if found := find_splits(path, suffix):
            return found
    return {}


def _read(files: list[str]) -> Any:
    """Return one table of all files."""
    try:
        import pyarrow
    except ImportError as error:
        raise BackendUnavailable(f"{_INSTALL} ({error})") from error
    size = sum(os.path.getsize(file) for file in files if file.endswith(_SUFFIXES[0]))
    if size > (free := available_memory() // 2):
        raise DataError(
            f"{files[0]} and the files beside it have {size / 1e9:.1f} GB, more than half of the free memory "
            f"({free / 1e9:.1f} GB): store them with save_to_disk of the datasets package, whose files are mapped"
        )
    tables = []
    for file in files:
        try:
            open_regular(file).close()
            tables.append(_read_parquet(file) if file.lower().endswith(_SUFFIXES[0]) else _map_arrow(file))
            _ = tables[-1].column_names  # fails if they are not UTF-8
        except (OSError, ValueError, pyarrow.ArrowException) as error:
            reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise DataError(f"{file} cannot be read as a table ({reason}): download or write it again") from error
    try:
        return pyarrow.concat_tables(tables)
    except pyarrow.ArrowException as error:
        raise DataError(
            f"{files[0]} and the files beside it have different columns: keep those of one data set"
        ) from error


def _read_parquet(file: str) -> Any:
    from pyarrow import parquet

    return parquet.read_table(file, memory_map=True)


def _map_arrow(file: str) -> Any:
    """Return the table of an Arrow file of either form; its values stay on the disk."""
    import pyarrow
    from pyarrow import ipc

    source = pyarrow.memory_map(file)
    try:
        return ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        return ipc.open_file(source).read_all()


def _features(table: Any) -> Mapping[str, Any]:
    """Return what Hugging Face Datasets recorded about each column."""
    try:
        recorded = json.loads((table.schema.metadata or {}).get(b"huggingface", b"{}"))
        features = recorded["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return features if isinstance(features, dict) else {}


def _choose_columns(table: Any, path: Path) -> _Columns:
    features = _features(table)
    kinds = {name: entry.get("_type") for name, entry in features.items() if isinstance(entry, dict)}
    held = [name for name in table.column_names]
    images = [name for name in held if kinds.get(name) == "Image"] or [name for name in IMAGE_KEYS if name in held]
    if len(images) != 1:
        raise DataError(
            f"{path} has the columns {', '.join(held)}: none or several hold images (looked for "
            f"{', '.join(IMAGE_KEYS)}); rename one, {_OTHER}"
        )
    _check_image_type(table, images[0], path)
    names = {name: features[name]["names"] for name in held if kinds.get(name) == "ClassLabel"}
    usual = [name for name in LABEL_KEYS if name in held]
    labels = sorted(names, key=lambda name: -len(names[name])) if len(usual) != 1 else usual
    if not labels:
        raise DataError(
            f"{path} has the columns {', '.join(held)}: none or several hold labels (looked for "
            f"{', '.join(LABEL_KEYS)}); rename one, {_OTHER}"
        )
    others = [name for name in names if name != labels[0]]
    notes = (f"{path}: the labels are those of {labels[0]}, not of {', '.join(others)}",) if others else ()
    classes = tuple(map(str, names[labels[0]])) if labels[0] in names else None
    return _Columns(images[0], labels[0], classes, notes)


def _check_image_type(table: Any, name: str, path: Path) -> None:
    from pyarrow import types

    kind = table.schema.field(name).type
    if types.is_struct(kind):
        kind = next((field.type for field in kind if field.name == "bytes"), None)
    if kind is None or not (types.is_binary(kind) or types.is_large_binary(kind)):
        found = table.schema.field(name).type
        raise DataError(f"{path}: the column {name} is {found}, not encoded images: convert it, {_OTHER}")


def _check_offsets(table: Any, columns: _Columns, where: str) -> None:
    """Check that no value of a mapped file lies outside of it, which pyarrow does not do when it opens one."""
    import pyarrow

    try:
        for name in (columns.image, columns.label):
            table.column(name).validate(full=True)
    except pyarrow.ArrowException as error:
        raise DataError(f"{where}: a column is damaged ({str(error)[:200]}): download or write it again") from error


def _labels(table: Any, columns: _Columns, where: str) -> Labels:
    if columns.label not in table.column_names or columns.image not in table.column_names:
        raise DataError(f"{where} has the columns {', '.join(table.column_names)}, not those of the training split")
    _check_offsets(table, columns, where)
    values = table.column(columns.label).to_pylist()
    if values and all(isinstance(value, int) and not isinstance(value, bool) for value in values):
        return np.array(values, np.int64)
    if values and all(isinstance(value, str) for value in values):
        return list(values)
    odd = next((value for value in values if not isinstance(value, (int, str))), None)
    raise DataError(f"{where}: the column {columns.label} holds {odd!r}: must be whole numbers or names of classes")
