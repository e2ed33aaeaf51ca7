"""Read tensor files of any origin without running code in them, and find the weights inside.

Pickles are read by torch's restricted unpickler. In addition to its own list it may build numpy scalars and
``argparse.Namespace``, which hold only data and which training scripts often store beside the weights.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.errors import CheckpointError

_WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Load a ``torch.save`` file onto the CPU; accept only tensors and plain data.

    Raises:
        CheckpointError: The file is missing or damaged, or its pickle contains code (none of it is run).
    """
    file = _existing(path)
    try:
        with torch.serialization.safe_globals(_plain_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refusal = re.search(r"(?i)unsupported (?:(?:global|class)\S* )+\S+", str(error))
        if refusal is None:
            raise CheckpointError(_damaged(file, "not what torch.save writes")) from error
        raise CheckpointError(
            f"{file} was rejected and nothing in it was run: its pickle holds more than tensors and plain values "
            f"({refusal[0]}). Use a file with the state dict alone, or a .safetensors file"
        ) from error
    except Exception as error:  # a damaged file can fail in any part of the reader
        raise CheckpointError(_damaged(file, error)) from error


def check_archive(path: str | os.PathLike[str]) -> None:
    """Compare every member of a ``torch.save`` file with its checksum, which ``torch.load`` does not.

    Raises:
        CheckpointError: A member has changed, or the file is not such an archive.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except Exception as error:  # a damaged archive can fail in any part of the reader
        raise CheckpointError(_damaged(Path(path), error)) from error
    if bad is not None:
        raise CheckpointError(_damaged(Path(path), f"{bad} does not match its checksum"))


def read_tensors(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """Read the named tensors of a .safetensors file, or of a torch file with the weights anywhere in its dict.

    Args:
        path: The file.
        key: Key of the weights in the dict, "a.b" for nested dicts; None searches under common names.

    Raises:
        CheckpointError: As for `read_torch_file`, or no weights are found, or several sets without `key`.
    """
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(Path(path))
    content = read_torch_file(path)
    if key is not None:
        for part in key.split("."):
            if not isinstance(content, Mapping) or part not in content:
                raise CheckpointError(f"{path} has nothing under `key` {key!r}: it holds {_describe(content)}")
            content = content[part]
    state = _find_state(content)
    if state is None:
        raise CheckpointError(f"no weights found in {path}: it holds {_describe(content)}; pass `key` to locate them")
    return state


def _existing(path: str | os.PathLike[str]) -> Path:
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file}: pass the path of an existing file")
    return file


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
    ]


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    import safetensors.torch  # optional format, imported on use

    _existing(file)
    try:
        return dict(safetensors.torch.load_file(file))
    except Exception as error:  # the compiled reader has its own exception types
        raise CheckpointError(_damaged(file, error)) from error


def _find_state(content: Any, depth: int = 3) -> dict[str, Tensor] | None:
    """Return the first mapping of names to tensors: this one, one under a common key, or else the only other one."""
    if not isinstance(content, Mapping) or not content or depth == 0:
        return None
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if len(tensors) == len(content) or sum(name.endswith(".weight") for name in tensors) > 1:
        return tensors
    for key in _WEIGHT_KEYS:
        if (found := _find_state(content.get(key), depth - 1)) is not None:
            return found
    others = [found for value in content.values() if (found := _find_state(value, depth - 1)) is not None]
    return others[0] if len(others) == 1 else None


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return "a dict with the keys " + ", ".join(repr(key) for key in list(content)[:12])
    return f"a {type(content).__name__}"


def _damaged(file: Path, error: BaseException | str) -> str:
    reason = (str(error).strip() or type(error).__name__).split("\n")[0][:200]
    return (
        f"{file} cannot be read as a checkpoint: it is truncated, damaged or of another kind ({reason}); "
        "download it again"
    )
