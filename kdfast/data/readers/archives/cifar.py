"""CIFAR-10 and CIFAR-100 in their official python archives, as a folder or as the .tar.gz.

The archives are pickles, and a pickle can run any code. The unpickler here accepts only three harmless names (numpy's
array, its dtype, and text encoding), builds the arrays itself from their bytes, and rejects every other name before
any code of it runs.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import pickle
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np

from kdfast.data.source import ArraySplit, Source
from kdfast.data.views import ViewSpec
from kdfast.errors import DataError
from kdfast.files.inputs import MAX_CIFAR_BYTES, open_regular, read_bounded

_SIDE = 32
_NUMERIC_KINDS = "biuf"


@dataclass(frozen=True)
class Layout:
    """File names and keys of an archive.

    Attributes:
        kind: Key in SOURCES.
        folder: Name of the top folder in the .tar.gz.
        train: Files of the training split, in order.
        test: File of the test split.
        meta: File of the class names.
        labels: Key of the labels in the file of a split.
        names: Key of the class names in the meta file.
    """

    kind: str
    folder: str
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str
    names: str

    @property
    def files(self) -> tuple[str, ...]:
        """All files that are read."""
        return (*self.train, self.test, self.meta)


CIFAR10 = Layout(
    "cifar10",
    "cifar-10-batches-py",
    tuple(f"data_batch_{number}" for number in range(1, 6)),
    "test_batch",
    "batches.meta",
    "labels",
    "label_names",
)
CIFAR100 = Layout("cifar100", "cifar-100-python", ("train",), "test", "meta", "fine_labels", "fine_label_names")


def is_cifar(path: Path, layout: Layout) -> bool:
    """Return whether `path` is or holds an archive of this layout, complete or not."""
    if path.is_dir():
        return (
            path.name == layout.folder
            or (path / layout.folder).is_dir()
            # A single name of CIFAR-100, such as "meta", is too common.
            or sum((path / name).is_file() for name in layout.files) > 1
        )
    return path.name.endswith((".tar.gz", ".tgz", ".tar")) and _top_folder(path) == layout.folder


def open_cifar(path: Path, layout: Layout) -> Source:
    """Read a CIFAR archive into memory.

    Args:
        path: The folder, the folder around it, or the .tar.gz.
        layout: CIFAR10 or CIFAR100.

    Returns:
        The source, its training samples in the archive's order.

    Raises:
        DataError: A file is missing, damaged or has unexpected content, or its pickle contains code.
    """
    raw = _read_folder(path, layout) if path.is_dir() else _read_tar(path, layout)
    names = _unpickle(raw[layout.meta], f"{path}: {layout.meta}").get(layout.names)
    if not isinstance(names, list) or not names:
        raise DataError(f"{path}: {layout.meta} has no list {layout.names!r}; unpack the official archive again")
    train = [_read_split(raw[name], layout, f"{path}: {name}") for name in layout.train]
    images = np.concatenate([split.images for split in train])
    labels = np.concatenate([split.labels for split in train])
    return Source(
        path=str(path),
        kind=layout.kind,
        classes=tuple(_text(name) for name in names),
        train=ArraySplit(images, labels, f"{path}: training images"),
        test=_read_split(raw[layout.test], layout, f"{path}: {layout.test}"),
        view_spec=ViewSpec(kind="shift", size=(_SIDE, _SIDE), pad=4, flip=True),
    )


def _read_split(raw: bytes, layout: Layout, name: str) -> ArraySplit:
    content = _unpickle(raw, name)
    data, labels = content.get("data"), content.get(layout.labels)
    if not isinstance(data, _Array) or data.value.dtype != np.uint8 or data.value.shape[1:] != (3 * _SIDE**2,):
        raise DataError(f"{name} has no uint8 array 'data' of shape (N, 3072): unpack the official archive again")
    if isinstance(labels, _Array):
        labels = labels.value
    planes = data.value.reshape(-1, 3, _SIDE, _SIDE)
    try:
        return ArraySplit(planes.transpose(0, 2, 3, 1), np.asarray(labels), name)
    except ValueError as error:  # np.asarray rejects a ragged list; a DataError has its own message
        raise error if isinstance(error, DataError) else DataError(f"{name}: bad {layout.labels!r}: {error}") from error


def _read_folder(path: Path, layout: Layout) -> dict[str, bytes]:
    root = path / layout.folder if (path / layout.folder).is_dir() else path
    missing = [name for name in layout.files if not (root / name).is_file()]
    if missing:
        raise DataError(f"{root} lacks {', '.join(missing)}: unpack the official archive again")
    try:
        return {name: read_bounded(root / name, MAX_CIFAR_BYTES) for name in layout.files}
    except OSError as error:
        raise DataError(f"cannot read {error.filename or root}: {error.strerror or error}") from error


def _read_tar(path: Path, layout: Layout) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    wanted = {f"{layout.folder}/{name}": name for name in layout.files}
    try:
        with _uncompressed(path) as stream:
            with tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|") as archive:
                for member in archive:
                    name = wanted.get(member.name.removeprefix("./"))
                    file = archive.extractfile(member) if name and member.isfile() else None
                    if name and file:
                        found[name] = file.read()
            # The gzip checksum is at the end of the file, which the tar reader does not reach.
            while stream.read(1 << 20):
                pass
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or incomplete ({error}): download it again") from error
    missing = [name for name in layout.files if name not in found]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)}: download it again")
    return found


class _Bounded:
    """A stream that ends in an error after `MAX_CIFAR_BYTES`, as a compressed bomb would."""

    def __init__(self, stream: gzip.GzipFile | BinaryIO) -> None:
        self._stream = stream
        self._left = MAX_CIFAR_BYTES

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes."""
        data = self._stream.read(min(size, self._left + 1))
        self._left -= len(data)
        if self._left < 0:
            raise OSError(errno.EFBIG, f"it has more than {MAX_CIFAR_BYTES} bytes uncompressed")
        return data


@contextlib.contextmanager
def _uncompressed(path: Path) -> Iterator[_Bounded]:
    with open_regular(path) as file:
        compressed = file.read(2) == b"\x1f\x8b"
        file.seek(0)
        yield _Bounded(gzip.GzipFile(fileobj=file) if compressed else file)


def _top_folder(path: Path) -> str | None:
    try:
        with _uncompressed(path) as stream, tarfile.open(fileobj=cast(BinaryIO, stream), mode="r|") as archive:
            tops = (PurePosixPath(member.name).parts[:1] for member in archive)
            # The entry "./" has no parts.
            return next((top[0] for top in tops if top), None)
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable tar archive ({error}): download it again") from error


def _unpickle(raw: bytes, name: str) -> dict[str, Any]:
    """Load a dictionary of plain containers and arrays, with its keys as text."""
    try:
        content = _DataUnpickler(io.BytesIO(raw), encoding="bytes").load()
    except Exception as error:  # the unpickler raises errors of nearly every type on damaged bytes
        raise DataError(
            f"{name} is damaged or not a CIFAR file ({error}): unpack the official archive again"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{name} holds a {type(content).__name__}, not a dictionary: unpack the official archive again")
    return {_text(key): value for key, value in content.items()}


def _text(value: object) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


class _Dtype:
    """Replacement for numpy.dtype that keeps the type code and accepts only numbers."""

    def __init__(self, code: object, *_flags: object) -> None:
        self.code = _text(code)
        self.order = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def numpy(self) -> np.dtype[Any]:
        dtype = np.dtype(self.code)
        if dtype.kind not in _NUMERIC_KINDS:
            raise pickle.UnpicklingError(f"it holds an array of {dtype}, not of numbers")
        return dtype.newbyteorder(">") if self.order == ">" else dtype


class _Array:
    """Replacement for numpy.ndarray that builds the array from its pickled shape and bytes, without numpy's code."""

    def __init__(self) -> None:
        self.value: np.ndarray[Any, np.dtype[Any]] = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, fortran, raw = state
        self.value = np.frombuffer(raw, dtype.numpy()).reshape(shape, order="F" if fortran else "C")


def _reconstruct(kind: object, *_start: object) -> _Array:
    if kind is not _Array:
        raise pickle.UnpicklingError("it holds an array of an unknown type")
    return _Array()


def _from_buffer(raw: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, _text(order) == "F", raw))
    return array


def _encode(text: str, encoding: object) -> bytes:
    # In protocol 2, Python 3 writes bytes as text in latin1. Other codecs could be slow or unsafe.
    if _text(encoding) != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes in the encoding {encoding!r}")
    return text.encode("latin1")


# numpy 2 pickles as numpy._core, older versions as numpy.core.
_ACCEPTED = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ACCEPTED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which is code, not data") from None
