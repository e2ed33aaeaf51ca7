"""Reading tensor files of any origin without running anything in them, and finding the weights inside.

Pickles are read by torch's restricted unpickler. On top of its own list it may build numpy scalars and
``argparse.Namespace``, which training scripts like to store next to the weights and which hold only data.
"""

from __future__ import annotations

import argparse
import os
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kdfast.errors import CheckpointError

_WEIGHT_KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "weights", "params")


def read_torch_file(path: str | os.PathLike[str]) -> Any:
    """Load a ``torch.save`` file onto the CPU, admitting tensors and plain data only.

    Raises:
        CheckpointError: The file is missing or truncated, or its pickle wants to run code (nothing of it is run).
    """
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file}: give the path of an existing file")
    try:
        with torch.serialization.safe_globals(_plain_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refusal = re.search(r"(?i)unsupported (?:(?:global|class)\S* )+\S+", str(error))
        if refusal is None:
            raise CheckpointError(_damaged(file, "not what torch.save writes")) from error
        raise CheckpointError(
            f"{file} was refused and nothing in it was run: its pickle holds more than tensors and plain values "
            f"({refusal[0]}). Ask for a file with the state dict alone, or for a .safetensors file"
        ) from error
    except Exception as error:  # a damaged file can fail in any part of the reader
        raise CheckpointError(_damaged(file, error)) from error


def read_tensors(path: str | os.PathLike[str], key: str | None = None) -> dict[str, Tensor]:
    """The named tensors in a .safetensors file, or in a torch file, wherever in its dict they are.

    Args:
        path: The file.
        key: Where in the dict the weights are, "a.b" for nested dicts; found by usual names when not given.

    Raises:
        CheckpointError: As `read_torch_file`; or no weights are found, or several and no key says which.
    """
    if Path(path).suffix == ".safetensors":
        return _read_safetensors(Path(path))
    content = read_torch_file(path)
    if key is not None:
        for part in key.split("."):
            if not isinstance(content, Mapping) or part not in content:
                raise CheckpointError(f"{path} has nothing under key {key!r}: there is {_describe(content)}")
            content = content[part]
    state = _find_state(content)
    if state is None:
        raise CheckpointError(
            f"no weights found in {path}: it holds {_describe(content)}; name their place with --key (key= in Python)"
        )
    return state


def _plain_globals() -> list[Any]:
    scalar = np.float64(0).__reduce__()[0]  # numpy's scalar constructor: its module's name differs between versions
    kinds = [type(np.dtype(code)) for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")]
    # numpy 1 pickles under numpy.core, numpy 2 under numpy._core.
    return [
        (scalar, "numpy.core.multiarray.scalar"),
        (scalar, "numpy._core.multiarray.scalar"),
        np.dtype,
        *kinds,
        argparse.Namespace,
    ]


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    import safetensors.torch

    if not file.is_file():
        raise CheckpointError(f"no checkpoint at {file}: give the path of an existing file")
    try:
        return dict(safetensors.torch.load_file(file))
    except Exception as error:  # the reader is compiled code with exception kinds of its own
        raise CheckpointError(_damaged(file, error)) from error


def _find_state(content: Any, depth: int = 3) -> dict[str, Tensor] | None:
    """The first mapping of names to tensors: this one, then those under usual keys, then any other single one."""
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
        f"{file} cannot be read as a checkpoint: it is truncated, damaged or of another kind ({reason}); fetch it again"
    )
