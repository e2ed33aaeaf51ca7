"""Read rows of an array a block at a time: of an array or tensor, or of a file that stays on disk."""

from __future__ import annotations

import mmap
import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from kdfast.data.arrays import as_array
from kdfast.errors import DataError, UsageError, did_you_mean
from kdfast.files.arrays import read_npy
from kdfast.files.pickles import read_pickle
from kdfast.nets.foreign import FETCH_AGAIN

Array = npt.NDArray[Any]
RowSource = str | os.PathLike[str] | npt.ArrayLike | Tensor

SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_PLAIN = "float16, bfloat16, float32 or float64"


class Rows(Protocol):
    """An array of floating-point numbers whose rows are read a block at a time, from the first to the last.

    Attributes:
        shape: Shape of the array.
        bits: Bits of a number.
    """

    shape: tuple[int, ...]
    bits: int

    def read(self, begin: int, end: int) -> Array:
        """Return the rows from `begin` up to `end`; `begin` is 0 or the last `end`."""


class ArrayRows:
    """Rows of a numpy array; pages of a mapped file are released once they are read."""

    def __init__(self, array: Array, what: str) -> None:
        _check_floats(array.dtype.kind == "f" and array.dtype.itemsize <= 8, array.dtype, what)
        self.shape, self.bits, self._array = array.shape, array.dtype.itemsize * 8, array
        base: Any = array.base
        self._map = base if isinstance(base, mmap.mmap) else None

    def read(self, begin: int, end: int) -> Array:
        """Return the rows from `begin` up to `end`."""
        rows: Array = np.array(self._array[begin:end], order="C")
        if self._map is not None:
            self._map.madvise(mmap.MADV_DONTNEED)
        return rows


class TensorRows:
    """Rows of a tensor, also one that is mapped from a file."""

    def __init__(self, tensor: Tensor, what: str) -> None:
        _check_floats(tensor.is_floating_point() and tensor.layout == torch.strided, tensor.dtype, what)
        self.shape, self.bits, self._tensor = tuple(tensor.shape), tensor.element_size() * 8, tensor.detach()

    def read(self, begin: int, end: int) -> Array:
        """Return the rows from `begin` up to `end`."""
        return _to_numpy(self._tensor[begin:end])


class MemberRows:
    """Rows of an array in an .npz file."""

    def __init__(self, path: Path, member: str) -> None:
        self._path, self._member = path, member
        self._archive = zipfile.ZipFile(path)
        self._file = self._open()

    def _open(self) -> BinaryIO:
        file = cast(BinaryIO, self._archive.open(f"{self._member}.npy"))
        try:
            self._read_header(file)
        except BaseException:
            file.close()
            self._archive.close()
            raise
        return file

    def _read_header(self, file: BinaryIO) -> None:
        version = np.lib.format.read_magic(file)
        if version not in _HEADERS:
            raise ValueError(f"format version {version}")
        self.shape, fortran, dtype = _HEADERS[version](file)
        _check_floats(dtype.kind == "f" and dtype.itemsize <= 8, dtype, f"{self._path}, {self._member},")
        if fortran and len(self.shape) > 1:
            raise DataError(
                f"{self._path}, {self._member}, is stored by columns: write np.ascontiguousarray(logits), or a .npy "
                "file"
            )
        self._dtype, self.bits = dtype, dtype.itemsize * 8

    def read(self, begin: int, end: int) -> Array:
        """Return the rows from `begin` up to `end`, which follow those of the call before, or start at 0.

        Raises:
            DataError: The file is damaged.
        """
        if begin == 0:
            self._file = self._open()
        count = (end - begin) * int(np.prod(self.shape[1:], dtype=np.int64))
        try:
            raw = self._file.read(count * self._dtype.itemsize)
            return np.frombuffer(raw, self._dtype, count).reshape(end - begin, *self.shape[1:])
        except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise DataError(f"{self._path}, {self._member}, is damaged ({error}): write it again") from error


class SlicedRows:
    """Rows of a tensor in a .safetensors file."""

    def __init__(self, path: Path, name: str) -> None:
        from safetensors import safe_open  # optional format, imported on use

        self._slice: Any = safe_open(str(path), "pt").get_slice(name)  # type: ignore[no-untyped-call]
        self.shape = tuple(self._slice.get_shape())
        first = self._slice[:1]
        _check_floats(first.is_floating_point(), first.dtype, f"{path}, {name},")
        self.bits = first.element_size() * 8

    def read(self, begin: int, end: int) -> Array:
        """Return the rows from `begin` up to `end`."""
        return _to_numpy(self._slice[begin:end])


def open_rows(source: RowSource, *, what: str, key: str | None = None) -> Rows:
    """Return the rows of an array, a tensor, or a file.

    Args:
        source: The values, or the path of a .npy, .npz, .pt, .pth or .safetensors file.
        what: What they are; also the name of the array that is chosen where a file holds several.
        key: Name of the array in the file. None: the only one, or the one called `what`.

    Raises:
        DataError: The file is missing or damaged, or the values are no floating-point numbers.
        UsageError: The file holds several arrays, or none of this name.
    """
    if isinstance(source, Tensor):
        return TensorRows(source, f"`{what}`")
    if not isinstance(source, (str, os.PathLike)):
        return ArrayRows(as_array(source, f"`{what}`", "an array of floating-point numbers"), f"`{what}`")
    path = Path(source)
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"`{what}` is {path}: pass a file named {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise DataError(f"there is no file {path}: check the path")
    if path.suffix.lower() == ".npy":
        if key is not None:
            raise UsageError(f"`key` is {key!r}, but {path} holds one array: omit it")
        return ArrayRows(read_npy(path, mmap_mode="r"), str(path))
    try:
        return _open_member(path, what, key)
    except (DataError, UsageError):
        raise
    except Exception as error:  # a damaged file can fail in any part of its reader
        reason = " ".join(str(error).split("\n")[0].split())[:150] or type(error).__name__
        raise DataError(f"{path} is damaged or of another kind ({reason}): write it again, or {FETCH_AGAIN}") from error


def _open_member(path: Path, what: str, key: str | None) -> Rows:
    suffix = path.suffix.lower()
    if suffix == ".npz":
        with zipfile.ZipFile(path) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
        return MemberRows(path, _choose(names, path, what, key))
    if suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(str(path), "pt") as file:
            names = list(file.keys())
        return SlicedRows(path, _choose(names, path, what, key))
    content = _load_torch(path)
    if isinstance(content, (Tensor, np.ndarray)):
        return _rows_of(content, str(path))
    arrays = content.items() if isinstance(content, dict) else ()
    found = {str(name): array for name, array in arrays if isinstance(array, (Tensor, np.ndarray))}
    name = _choose(list(found), path, what, key)
    return _rows_of(found[name], f"{path}, {name},")


def _load_torch(path: Path) -> Any:
    """Read a file of torch.save, mapped into memory if it holds tensors alone."""
    try:
        # Older files of torch.save are no archives, and cannot be mapped.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError:  # numpy arrays, which torch refuses
        return read_pickle(path)


def _rows_of(array: Tensor | Array, what: str) -> Rows:
    return TensorRows(array, what) if isinstance(array, Tensor) else ArrayRows(array, what)


def _choose(names: Sequence[str], path: Path, what: str, key: str | None) -> str:
    held = ", ".join(names[:20]) or "no array"
    if key is not None:
        if key not in names:
            raise UsageError(f"{path} has no `key` {key!r}: {did_you_mean(key, names)}it holds {held}")
        return key
    if len(names) == 1 or what in names:
        return what if what in names else names[0]
    raise UsageError(f"{path} holds {held}: " + ("choose one with `key`" if names else "write the array into it"))


def _check_floats(is_right: bool, dtype: object, what: str) -> None:
    if not is_right:
        raise DataError(f"{what} holds {str(dtype).removeprefix('torch.')}: write floating-point numbers, {_PLAIN}")


def _to_numpy(rows: Tensor) -> Array:
    rows = rows.cpu()
    return (rows.float() if rows.dtype == torch.bfloat16 else rows).contiguous().numpy()


def blocks(rows: Rows, nbytes: int = 8 << 20) -> Iterable[tuple[int, Array]]:
    """Yield all rows with the index of the first, in blocks of about `nbytes` in float64."""
    step = max(1, nbytes // max(1, 8 * int(np.prod(rows.shape[1:], dtype=np.int64))))
    for begin in range(0, rows.shape[0], step):
        yield begin, rows.read(begin, min(begin + step, rows.shape[0]))
