"""Read files of torch.save of any origin without running code in them.

Pickles are read by torch's restricted unpickler. In addition to its own list it may build values that hold only data
and that training scripts often store beside the weights: numpy scalars, namespaces, paths and dates.
"""

from __future__ import annotations

import argparse
import datetime
import os
import pathlib
import pickle
import re
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.errors import CheckpointError
from kdfast.files.inputs import available_memory
from kdfast.nets.file_kinds import describe_kind, resave_recipe

FETCH_AGAIN = "download it again"


def read_torch_file(path: str | os.PathLike[str], *, advice: str = FETCH_AGAIN) -> Any:
    """Load a ``torch.save`` file onto the CPU; accept only tensors and plain data.

    Args:
        path: The file.
        advice: The end of messages about damage, what to do.

    Raises:
        CheckpointError: The file is missing, damaged or of another kind, or its pickle contains code (none of it is
            run).
    """
    file = existing_file(path)
    _check_size(file)
    try:
        with torch.serialization.safe_globals(_plain_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refusal = re.search(r"(?i)unsupported (?:(?:global|class)\S* )+\S+", str(error))
        if refusal is None:
            raise CheckpointError(describe_damage(file, "not what torch.save writes", advice)) from error
        # A pickle alone was not written by torch.save: nothing in it is worth the risk.
        recipe = f": {resave_recipe(file)}" if zipfile.is_zipfile(file) else ""
        raise CheckpointError(
            f"{file} was rejected and nothing in it was run: its pickle holds more than tensors and plain values "
            f"({refusal[0]}). Use a file with the state dict alone, or a .safetensors file{recipe}"
        ) from error
    except Exception as error:  # a damaged file can fail in any part of the reader
        raise CheckpointError(describe_damage(file, error, advice)) from error


def check_archive(path: str | os.PathLike[str], advice: str = FETCH_AGAIN) -> None:
    """Compare every member of a ``torch.save`` file with its checksum, which ``torch.load`` does not.

    Raises:
        CheckpointError: A member has changed, or the file is not such an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged archive can fail in any part of the reader
        raise CheckpointError(describe_damage(Path(path), error, advice)) from error
    if bad is not None:
        raise CheckpointError(describe_damage(Path(path), f"{bad} does not match its checksum", advice))


def existing_file(path: str | os.PathLike[str]) -> Path:
    """Return the file at a path, which may be the folder of a finished run.

    Raises:
        CheckpointError: There is none.
    """
    file = Path(path)
    student = file / "student.pt"
    if student.is_file():
        return student
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file}: pass the path of an existing file")
    return file


def _check_size(file: Path) -> None:
    """Check that the unpacked members of an archive fit into memory: torch unpacks compressed ones of any size.

    Raises:
        CheckpointError: They do not.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            need = sum(member.file_size for member in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # of another kind, or damaged, as torch will say
    if need > (free := available_memory()):
        raise CheckpointError(
            f"{file} takes {need / 1e9:.1f} GB, and {free / 1e9:.1f} GB of memory are free: free some, or use a "
            "smaller checkpoint"
        )


def _plain_globals() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]  # numpy's scalar constructor, whose module depends on the version
    kinds = [type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    # numpy 1 pickles as numpy.core, numpy 2 as numpy._core.
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *kinds,
        argparse.Namespace,
        types.SimpleNamespace,
        *_path_globals(),
        datetime.date,
        datetime.datetime,
        datetime.timedelta,
        datetime.timezone,
    ]


def _path_globals() -> list[Any]:
    """Return paths of all systems as pure paths, which touch no file; Python 3.13 names them pathlib._local."""
    kinds = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}
    return [
        (kind, f"{module}.{prefix}{name}")
        for name, kind in kinds.items()
        for module in ("pathlib", "pathlib._local")
        for prefix in ("", "Pure")
    ]


def describe_damage(file: Path, error: BaseException | str, advice: str = FETCH_AGAIN) -> str:
    """Return the message about a file that a reader failed on: what it is if it is recognized, else the reason."""
    if (kind := describe_kind(file)) is not None:
        return f"{file} {kind}"
    reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
    return f"{file} cannot be read as a checkpoint: it is truncated, damaged or of another kind ({reason}); {advice}"
