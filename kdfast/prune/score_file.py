"""scores.npz: a score a training sample, with what it was computed by and from."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import kdfast
from kdfast.errors import DataError, UsageError
from kdfast.files import atomic_write, check_writable
from kdfast.prune.rules.base import FloatArray
from kdfast.prune.scores.base import require_sound

_FORMAT = "kdfast scores 1"
_SCORES, _ABOUT, _EXTRA = "scores", "about", "extra."
_KEYS = {"format", "method", "parameters", "data", "sources", "seconds", "digest"}
_AGAIN = "score this data again with kdfast score"


@dataclass(frozen=True)
class ScoreFile:
    """Scores and their provenance.

    Attributes:
        scores: float64 (N,), in the order of the training split; higher = harder.
        method: A key of `kdfast.prune.scores.registry.SCORES`, or any name.
        data: Fingerprint of the data.
        extras: Further numbers a sample, float64 (N,) each.
        parameters: The method's options and the seed.
        sources: Digests of what the scores were computed from, by name: cache, dynamics, teacher.
        seconds: Time it took.
    """

    scores: FloatArray
    method: str
    data: str
    extras: dict[str, FloatArray] = field(default_factory=dict)
    parameters: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def digest(self) -> str:
        """SHA-256 (hexadecimal) of scores, extras, method and parameters; not of the seconds."""
        head = {"method": self.method, "data": self.data, "parameters": self.parameters, "sources": self.sources}
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for name, values in [("", self.scores), *sorted(self.extras.items())]:
            digest.update(name.encode() + b"\0" + values.astype("<f8").tobytes())
        return digest.hexdigest()


def check_score_path(path: str | os.PathLike[str]) -> None:
    """Refuse a place that `write_scores` would refuse, before the work.

    Raises:
        UsageError: `path` does not end in .npz.
    """
    if Path(path).suffix != ".npz":
        raise UsageError(f"{path}: a file of scores is named .npz; give such a name")


def write_scores(path: str | os.PathLike[str], content: ScoreFile) -> None:
    """Write scores.npz atomically; plain numpy reads it: `np.load(path)["scores"]`.

    Args:
        path: The .npz file; its folder is made when missing.
        content: What to write.

    Raises:
        UsageError: `path` does not end in .npz.
        DataError: Scores or extras are not one finite number a sample.
        OutputError: The file cannot be written.
    """
    check_score_path(path)
    n = len(content.scores)
    arrays = {_SCORES: content.scores, **{f"{_EXTRA}{name}": values for name, values in content.extras.items()}}
    for name, values in arrays.items():
        require_sound(values, n, name)
    about = {
        "format": _FORMAT,
        "method": content.method,
        "parameters": content.parameters,
        "data": content.data,
        "sources": content.sources,
        "seconds": content.seconds,
        "digest": content.digest,
        "kdfast": kdfast.__version__,
    }
    check_writable(Path(path).parent)
    stored: dict[str, Any] = {**arrays, _ABOUT: np.array(json.dumps(about))}
    with atomic_write(path) as file:
        np.savez(file, **stored)


def read_scores(path: str | os.PathLike[str], *, n: int, fingerprint: str) -> ScoreFile:
    """Read scores.npz and make sure that it belongs to the data.

    Args:
        path: The file.
        n: Training samples of the data.
        fingerprint: Of the data.

    Raises:
        DataError: It is missing or damaged, no file of scores, of another length or other data, or not finite.
    """
    arrays = _arrays(Path(path))
    about = _about(arrays, path)
    scores = arrays.pop(_SCORES)
    if scores.shape != (n,):
        raise DataError(f"{path} holds {len(scores)} scores, this data has {n} training samples; {_AGAIN}")
    if about["data"] != fingerprint:
        raise DataError(
            f"{path} was made of other data (fingerprint {str(about['data'])[:12]}; this data has {fingerprint[:12]}); "
            f"{_AGAIN}"
        )
    extras = {name.removeprefix(_EXTRA): values for name, values in arrays.items() if name.startswith(_EXTRA)}
    for name, values in {_SCORES: scores, **extras}.items():
        require_sound(values, n, f"{path}: {name}")
    content = ScoreFile(
        scores.astype(np.float64),
        about["method"],
        about["data"],
        extras,
        about["parameters"],
        about["sources"],
        about["seconds"],
    )
    if content.digest != about["digest"]:
        raise DataError(f"{path} has changed since it was written: its digest does not match; {_AGAIN}")
    return content


def _arrays(path: Path) -> dict[str, Any]:
    """All arrays of an .npz."""
    arrays: dict[str, Any] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                with archive.open(name) as file:
                    arrays[name.removesuffix(".npy")] = np.lib.format.read_array(file, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"there is no {path}; make it with kdfast score") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} is damaged or no .npz ({error}); {_AGAIN}") from error
    return arrays


def _about(arrays: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """The description in the file, taken out of its arrays."""
    try:
        about = json.loads(str(arrays.pop(_ABOUT)))
    except (KeyError, ValueError):
        about = None
    if _SCORES not in arrays or not isinstance(about, dict) or not about.keys() >= _KEYS or about["format"] != _FORMAT:
        raise DataError(f"{path} is no file of scores that this kdfast wrote; {_AGAIN}")
    return about
