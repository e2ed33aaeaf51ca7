"""Structure of FFCV's .beton files, version 2: header, fields, one row per sample, and a table of the pixel data.

It is read without FFCV, whose import takes seconds, and every pointer is checked to lie inside the file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError

__all__ = ["FIELD", "HEADER", "SAMPLE", "TABLE", "read_structure"]

HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
_IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])
SAMPLE = np.dtype([("f0", _IMAGE), ("f1", "<i8")], align=True)
TABLE = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])

_VERSION = 2
_INT_FIELD, _IMAGE_FIELD = 1, 2
_RAW = 1
_REMEDY = "convert the data again with kdfast data convert"


def read_structure(path: Path) -> tuple[IntArray, tuple[int, int, int]]:
    """Read a file with one image field and one integer field.

    Returns:
        Labels, int64 `(N,)`, and the image shape, `(H, W, 3)`.

    Raises:
        DataError: The file is missing, truncated or unfinished, or has other fields, images of different sizes, or
            pointers outside the file.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            header = _first(np.fromfile(file, HEADER, 1))
            if header is None or header["version"] != _VERSION:
                raise DataError(f"{path} is not a .beton file of version {_VERSION}: {_REMEDY}")
            _check_fields(path, int(header["num_fields"]), np.fromfile(file, FIELD, 2))
            count, start = int(header["num_samples"]), int(header["alloc_table_ptr"])
            if not count or size - start != count * TABLE.itemsize or file.tell() + count * SAMPLE.itemsize > start:
                raise DataError(f"{path} is empty, truncated or unfinished: {_REMEDY}")
            samples = np.fromfile(file, SAMPLE, count)
            file.seek(start)
            table = np.fromfile(file, TABLE, count)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    images = samples["f0"]
    _check_pointers(path, images, np.sort(table, order="ptr"), size)
    return samples["f1"].astype(np.int64), (int(images["height"][0]), int(images["width"][0]), 3)


def _first(rows: npt.NDArray[Any]) -> Any:
    return rows[0] if len(rows) else None


def _check_fields(path: Path, count: int, fields: npt.NDArray[Any]) -> None:
    if count != 2 or [int(kind) for kind in fields["type_id"]] != [_IMAGE_FIELD, _INT_FIELD]:
        raise DataError(f"{path} does not have an RGB image field and an integer field, in this order: {_REMEDY}")
    names = [bytes(name).rstrip(b"\0") for name in fields["name"]]
    if names != [b"image", b"label"]:
        raise DataError(f"{path} has fields {names}, not image and label: {_REMEDY}")


def _check_pointers(path: Path, images: npt.NDArray[Any], table: npt.NDArray[Any], size: int) -> None:
    height, width = int(images["height"][0]), int(images["width"][0])
    if (images["height"] != height).any() or (images["width"] != width).any():
        raise DataError(f"{path} has images of different sizes: convert the data with `size`")
    positions = np.searchsorted(table["ptr"], images["data_ptr"])
    found = table[np.minimum(positions, len(table) - 1)]
    raw = images["mode"] == _RAW
    valid = (
        bool(height and width)
        and bool((found["ptr"] == images["data_ptr"]).all())
        and int(table["ptr"][-1]) <= size
        and int(table["size"].max()) <= size
        and int((table["ptr"] + table["size"]).max()) <= size
        and bool((found["size"][raw] == height * width * 3).all())
        and bool((images["mode"] <= _RAW).all())
    )
    if not valid:
        raise DataError(f"{path} has samples without complete pixel data, so it is damaged or unfinished: {_REMEDY}")
