"""Read arrays from pickles and files of torch.save without running code in them and without torch.

The unpickler builds numbers, texts, containers, numpy arrays and torch tensors, which become numpy arrays. It looks up
no other class or function, so a pickle that names one is refused before anything in it is called.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from kdfast.errors import DataError, KdfastError
from kdfast.files.inputs import available_memory, open_regular

Array = npt.NDArray[Any]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first value in files of torch.save before version 1.6
_DTYPES = {
    "Double": "<f8", "Float": "<f4", "Half": "<f2", "Long": "<i8", "Int": "<i4", "Short": "<i2", "Char": "i1",
    "Byte": "u1", "Bool": "?", "BFloat16": "<u2",
}  # fmt: skip
_BFLOAT16 = "BFloat16"


def read_pickle(path: str | os.PathLike[str], *, error: type[KdfastError] = DataError) -> Any:
    """Read a pickle, or a file of torch.save.

    Args:
        path: The file.
        error: The error to raise.

    Returns:
        The content: numbers, texts, lists, tuples, dicts, and numpy arrays in place of arrays and tensors.

    Raises:
        KdfastError: Of type `error`, if the file is missing or damaged, is too large for the memory, or holds anything
            else.
    """
    try:
        with open_regular(path) as file:
            need, free = os.fstat(file.fileno()).st_size, available_memory()
            if need > free:
                raise error(f"{path} takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: free some")
            if zipfile.is_zipfile(file):
                return _read_archive(file)
            file.seek(0)
            return _read_stream(file)
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror or exc}") from exc
    except _Refused as exc:
        raise error(
            f"{path} was refused and nothing in it was run: it holds more than numbers, texts and arrays ({exc}); save "
            "the array alone with np.save"
        ) from exc
    except KdfastError:
        raise
    except Exception as exc:  # a damaged file can fail in any part of the reader
        reason = " ".join(str(exc).split())[:120] or type(exc).__name__
        raise error(
            f"{path} is damaged or neither a pickle nor a file of torch.save ({reason}): save the array alone with "
            "np.save"
        ) from exc


class _Refused(Exception):
    """A pickle names something that is not allowed; the text says what."""


class _Storage:
    """The flat values of a tensor.

    Args:
        kind: The name of the values' type, a key of `_DTYPES`.
        raw: Their bytes.
    """

    def __init__(self, kind: str, raw: bytes) -> None:
        self.kind, self.raw = kind, raw


class _Unpickler(pickle.Unpickler):
    """Restricted to plain values and arrays; `load_storage` returns the flat values behind a persistent id."""

    def __init__(self, file: Any, load_storage: Callable[[Any], _Storage] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self._load_storage = load_storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.removesuffix("Storage") in _DTYPES:
            return name.removesuffix("Storage")
        if (module, name) in _ALLOWED:
            return _ALLOWED[module, name]
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if self._load_storage is None:
            raise _Refused("references to other files")
        return self._load_storage(pid)


def _read_stream(file: BinaryIO) -> Any:
    """Read a pickle, or a file of torch.save before version 1.6: several pickles, then the values."""
    first = _Unpickler(file).load()
    return _read_legacy(file) if isinstance(first, int) and first == _LEGACY_MAGIC else first


def _read_legacy(file: BinaryIO) -> Any:
    for _ in range(2):  # the version of the protocol, and facts about the machine
        _Unpickler(file).load()
    start = file.tell()
    end = file.seek(0, os.SEEK_END)
    file.seek(start)
    # The values come last, so a first pass finds the end of the pickle and what to read.
    kinds: dict[str, str] = {}

    def note(pid: Any) -> _Storage:
        kinds[pid[2]] = pid[1]
        size = int(pid[4]) * np.dtype(_DTYPES[pid[1]]).itemsize
        if size > end:
            raise ValueError("it ends too early")
        return _Storage(pid[1], bytes(size))

    _Unpickler(file, note).load()
    storages: dict[str, _Storage] = {}
    for key in _Unpickler(file).load():
        count = int.from_bytes(file.read(8), "little")
        size = count * np.dtype(_DTYPES[kinds[key]]).itemsize
        storages[key] = _Storage(kinds[key], file.read(size))
    file.seek(start)
    return _Unpickler(file, lambda pid: storages[pid[2]]).load()


def _read_archive(file: BinaryIO) -> Any:
    """Read a file of torch.save: a zip archive with a pickle, and one member for the values of each tensor."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
        if sum(info.file_size for info in infos) > available_memory():
            raise ValueError("its members take more memory than is free")
        main = next((info.filename for info in infos if info.filename.rpartition("/")[2] == "data.pkl"), None)
        if main is None:
            raise ValueError("an archive without data.pkl")
        folder = main.removesuffix("data.pkl")

        def load(pid: Any) -> _Storage:
            return _Storage(pid[1], archive.read(f"{folder}data/{pid[2]}"))

        return _Unpickler(io.BytesIO(archive.read(main)), load).load()


def _load_from_bytes(raw: bytes) -> Any:
    """Read the values of a tensor in a plain pickle, which are a file of torch.save in turn."""
    return _read_stream(io.BytesIO(raw))


def _rebuild_tensor(storage: _Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Array:
    dtype = np.dtype(_DTYPES[storage.kind])
    # numpy refuses strides that lead outside of the buffer. The copy is no larger than the tensor claims to be.
    if math.prod(size) * dtype.itemsize > len(storage.raw):
        raise ValueError("a tensor is larger than its values")
    strides = [step * dtype.itemsize for step in stride]
    array = np.ndarray(tuple(size), dtype, storage.raw, offset * dtype.itemsize, strides).copy()
    if storage.kind == _BFLOAT16:
        array = (array.astype("<u4") << 16).view("<f4")
    return array


def _rebuild_parameter(data: Array, *_: Any) -> Array:
    return data


def _allowed() -> Mapping[tuple[str, str], Any]:
    reconstruct, scalar = np.empty(0).__reduce__()[0], np.float64(0).__reduce__()[0]
    frombuffer = np.zeros(1).__reduce_ex__(5)[0]
    allowed: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("collections", "OrderedDict"): collections.OrderedDict,
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("torch.storage", "_load_from_bytes"): _load_from_bytes,
        ("_codecs", "encode"): lambda text, *_: text.encode("latin1"),
        **{("builtins", kind.__name__): kind for kind in (set, frozenset)},
        **{("__builtin__", kind.__name__): kind for kind in (set, frozenset)},
    }
    # numpy 1 pickles as numpy.core, numpy 2 as numpy._core.
    for core in ("numpy.core", "numpy._core"):
        allowed |= {
            (f"{core}.multiarray", "_reconstruct"): reconstruct,
            (f"{core}.multiarray", "scalar"): scalar,
            (f"{core}.numeric", "_frombuffer"): frombuffer,
        }
    for kind in {type(np.dtype(code)) for code in "?bhilqBHILQefd"}:
        allowed["numpy.dtypes", kind.__name__] = kind
    return allowed


_ALLOWED = _allowed()
