"""MNIST and its relatives (Fashion-MNIST, KMNIST, a set of EMNIST) in their idx files, plain or gzipped."""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.source import ArraySplit, Source, default_view_spec, infer_class_names
from kdfast.errors import DataError
from kdfast.files.inputs import available_memory, open_regular

_NAME = re.compile(r"(?P<set>.*?)(?P<part>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(?P<gz>\.gz)?")
_UNSIGNED_BYTE = 8
_WANTED = "train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte (or .gz)"

Key = tuple[str, str]  # part and what


def is_idx(path: Path) -> bool:
    """Return whether `path`, its `raw`, or the `raw` of a sub-folder holds idx files."""
    return path.is_dir() and bool(_find(path))


def open_idx(path: Path) -> Source:
    """Read gray images and labels from idx files.

    Args:
        path: The folder of the files, or the folder that torchvision stores them under.

    Returns:
        The source; classes `0`, `1`, ... Views below 64 pixels do not flip.

    Raises:
        DataError: A file is missing or damaged, or there are several data sets.
    """
    sets = _find(path)
    if len(sets) > 1:
        raise DataError(
            f"{path} holds several data sets ({', '.join(sorted(sets))}): pass a folder with the files of one"
        )
    (name, files), *_ = sets.items()
    splits = {}
    for part in ("train", "test"):
        missing = [what for what in ("images", "labels") if (part, what) not in files]
        if missing:
            raise DataError(f"{name} lacks the {part} {' and '.join(missing)}: it needs {_WANTED}")
        images, labels = (_read(files[part, what], rank) for what, rank in (("images", 3), ("labels", 1)))
        splits[part] = ArraySplit(images, labels, str(files[part, "images"]))
    classes = infer_class_names(splits["train"].labels, str(path))
    views = default_view_spec(splits["train"].shape, flip=False)
    return Source(str(path), "idx", classes, splits["train"], splits["test"], views)


def _find(path: Path) -> dict[str, dict[Key, Path]]:
    """Return the files by data set; a plain file is preferred to the same one gzipped."""
    sets: dict[str, dict[Key, Path]] = {}
    for folder in (path, path / "raw", *(child / "raw" for child in sorted(path.iterdir()) if child.is_dir())):
        for name in sorted(os.listdir(folder), reverse=True) if folder.is_dir() else ():
            if match := _NAME.fullmatch(name):
                part = "train" if match["part"] == "train" else "test"
                sets.setdefault(str(folder / match["set"]), {})[part, match["what"]] = folder / name
    return sets


def _read(path: Path, rank: int) -> npt.NDArray[Any]:
    """Read an array of unsigned bytes: two zeros, the type, the rank, the lengths as 4 bytes each, the values."""
    try:
        with open_regular(path) as stream:
            file = gzip.GzipFile(fileobj=stream) if path.suffix == ".gz" else stream
            head = file.read(4 + 4 * rank)
            if len(head) < 4 + 4 * rank or head[:2] != b"\0\0" or head[2] != _UNSIGNED_BYTE or head[3] != rank:
                raise ValueError(f"it does not start like an idx file of {rank} dimensions of bytes")
            shape = np.frombuffer(head[4:], ">u4").tolist()
            need = math.prod(shape)
            if need > (free := available_memory()):
                raise ValueError(f"it takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free")
            values = file.read(need + 1)
    except (OSError, ValueError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or no idx file ({error}): download it again") from error
    if len(values) != need:
        raise DataError(
            f"{path} declares {need} values and holds {'fewer' if len(values) < need else 'more'}: download it again"
        )
    return np.frombuffer(values, np.uint8).reshape(shape)
