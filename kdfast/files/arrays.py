"""Read .npy and .npz files without trusting their headers: nothing is allocated that the file cannot fill."""

from __future__ import annotations

import mmap
import os
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from kdfast.errors import DataError, KdfastError
from kdfast.files.inputs import available_memory, open_regular

Array = npt.NDArray[Any]

_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_ENCRYPTED = 0x1
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_SUFFIX = ".npy"


def read_npy(
    path: str | os.PathLike[str],
    *,
    shape: Sequence[int] | None = None,
    dtype: npt.DTypeLike | None = None,
    mmap_mode: Literal["r", "c"] | None = None,
    error: type[KdfastError] = DataError,
    advice: str = "write it again with np.save",
) -> Array:
    """Read an array from a .npy file.

    Args:
        path: The file.
        shape: The required shape; -1 stands for any length. None: not checked.
        dtype: The required dtype. None: not checked.
        mmap_mode: Map the file into memory instead of reading it: "r", or "c" for copy on write.
        error: The error to raise.
        advice: The end of messages, what to do.

    Raises:
        KdfastError: Of type `error`, if the file is missing, damaged, not a plain array, or of another shape or dtype.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            array = _read_array(file, size, None if mmap_mode is None else (path, mmap_mode))
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror or exc}") from exc
    except _Malformed as exc:
        raise error(f"{path} is damaged or not a plain .npy array ({exc}): {advice}") from exc
    if shape is not None and not _fits(array.shape, shape):
        wanted = ", ".join("any" if length < 0 else str(length) for length in shape)
        raise error(f"{path} has shape {array.shape}, not ({wanted}): {advice}")
    if dtype is not None and array.dtype != np.dtype(dtype):
        raise error(f"{path} holds {array.dtype}, not {np.dtype(dtype)}: {advice}")
    return array


def read_npz(
    path: str | os.PathLike[str],
    names: Sequence[str] | None = None,
    *,
    member_bytes: int | None = None,
    error: type[KdfastError] = DataError,
    advice: str = "write it again with np.savez",
) -> dict[str, Array]:
    """Read arrays from an .npz file.

    Args:
        path: The file.
        names: The arrays to read; None for all.
        member_bytes: Largest allowed size of an array's file. None: not limited.
        error: The error to raise.
        advice: The end of messages, what to do.

    Returns:
        The arrays by name.

    Raises:
        KdfastError: Of type `error`, if the file is missing or damaged, lacks an array, or has one that is encrypted,
            compressed in an unusual way, repeated, too large, or not a plain array.
    """
    arrays: dict[str, Array] = {}
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            members = _members(archive)
            missing = [] if names is None else [name for name in names if name not in members]
            if missing:
                held = ", ".join(sorted(members)) or "nothing"
                raise error(f"{path} lacks {', '.join(missing)}; it holds {held}: {advice}")
            for name in members if names is None else names:
                arrays[name] = _read_member(archive, members[name], member_bytes)
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror or exc}") from exc
    except KdfastError:
        raise
    except Exception as exc:  # a damaged archive can fail in any part of the reader
        raise error(f"{path} is damaged or not an .npz of plain arrays ({_reason(exc)}): {advice}") from exc
    return arrays


def map_read_only(array: Array) -> Array:
    """Return an array that was mapped as a whole, mapped anew without write access; any other array as it is.

    Only of such arrays `release_pages` can be sure that no change is lost.
    """
    base: object = array.base  # numpy's types know arrays alone
    if not isinstance(array, np.memmap) or array.filename is None or not isinstance(base, mmap.mmap):
        return array
    if not array.flags.c_contiguous:
        return array
    return np.memmap(array.filename, array.dtype, "r", array.offset, array.shape)


def release_pages(array: Array) -> None:
    """Release the memory of an array that is a view of a file mapped read-only; it is read from the file again."""
    base: object = array
    while isinstance(base, np.ndarray):
        below: object = base.base
        if isinstance(base, np.memmap) and base.mode == "r" and isinstance(below, mmap.mmap):
            below.madvise(mmap.MADV_DONTNEED)
            return
        base = below


def row_blocks(array: Array, rows: int) -> Iterator[tuple[slice, Array]]:
    """Yield consecutive blocks of at most `rows` rows, and release the pages of each (see `release_pages`)."""
    for start in range(0, len(array), rows):
        block = slice(start, min(start + rows, len(array)))
        yield block, array[block]
        release_pages(array)


class _Malformed(Exception):
    """An array cannot be read; the text says why."""


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    members: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        name = info.filename.removesuffix(_SUFFIX)
        if name in members:
            raise _Malformed(f"it holds {info.filename} twice")
        members[name] = info
    return members


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, limit: int | None) -> Array:
    if info.flag_bits & _ENCRYPTED:
        raise _Malformed(f"{info.filename} is encrypted")
    if info.compress_type not in _COMPRESSIONS:
        raise _Malformed(f"{info.filename} has compression method {info.compress_type}")
    if limit is not None and info.file_size > limit:
        raise _Malformed(f"{info.filename} has {info.file_size} bytes, more than {limit}")
    with archive.open(info) as file:
        array = _read_array(file, info.file_size, None)  # type: ignore[arg-type]
        if file.read(1):  # reading to the end also compares the checksum
            raise _Malformed(f"{info.filename} has bytes after its array")
    return array


def _read_array(file: BinaryIO, size: int, mapped: tuple[str | os.PathLike[str], Literal["r", "c"]] | None) -> Array:
    """Read an array of a file of `size` bytes, or map the file if its path and mode are given."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # headers of Python 2
            version = np.lib.format.read_magic(file)
            if version not in _HEADERS:
                raise _Malformed(f"it has format version {version}")
            shape, _, dtype = _HEADERS[version](file)
    except OSError:
        raise
    except _Malformed:
        raise
    except Exception as exc:  # the header is parsed as Python code and can fail in any part of the parser
        raise _Malformed(_reason(exc)) from exc
    if dtype.hasobject:
        raise _Malformed("it holds Python objects")
    need = dtype.itemsize
    for length in shape:
        need *= int(length)
    if min(shape, default=0) < 0 or need != size - file.tell():
        raise _Malformed(f"its header declares {dtype} {shape}, but {size - file.tell()} bytes follow")
    if mapped is None and need > (free := available_memory()):
        raise _Malformed(f"it takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free")
    try:
        if mapped is not None and need:
            return np.asanyarray(np.load(mapped[0], mmap_mode=mapped[1], allow_pickle=False))
        file.seek(0)
        array: Array = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, TypeError, EOFError, OverflowError) as exc:
        raise _Malformed(_reason(exc)) from exc
    return array


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(want in (-1, have) for want, have in zip(wanted, shape, strict=True))


def _reason(exc: BaseException) -> str:
    return " ".join(str(exc).split())[:200] or type(exc).__name__
