"""scores.npz: one score per training sample, with its provenance."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import kdfast
from kdfast.data.arrays import as_values
from kdfast.errors import DataError, UsageError
from kdfast.files import atomic_write, check_replaceable, check_writable, schemas
from kdfast.files.arrays import read_npz
from kdfast.files.validate import check_type, decode_json
from kdfast.prune.rules.base import FloatArray
from kdfast.prune.scores.base import check_values

_FAMILY = "kdfast scores "
_FORMAT = f"{_FAMILY}1"
_ABOUT_START = 1024  # bytes of the description that hold its first field, the format
_SCORES, _ABOUT, _EXTRA = "scores", "about", "extra."
_ZIP = b"PK"  # the first bytes of an .npz file
_MAX_BYTES = 1 << 30  # of one array: 134 million scores
_PLAIN = "pass texts as method and data, plain finite numbers and texts as parameters, and texts as sources"
_SCORE_AGAIN = "score this data again with kdfast score, or write your own scores again"


@dataclass(frozen=True)
class ScoreFile:
    """Scores and their provenance.

    Attributes:
        scores: float64 (N,), in the order of the training split; higher = harder.
        method: A key of `kdfast.prune.scores.registry.SCORES`, or another name.
        data: Fingerprint of the data.
        extras: Further values per sample, float64 (N,) each.
        parameters: The method's options and the seed.
        sources: Digests of the inputs by name: cache, dynamics, teacher.
        seconds: Time of the computation.
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
        """SHA-256 (hexadecimal) of everything but the seconds."""
        head = {"method": self.method, "data": self.data, "parameters": self.parameters, "sources": self.sources}
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for name, values in [("", self.scores), *sorted(self.extras.items())]:
            digest.update(name.encode() + b"\0" + values.astype("<f8").tobytes())
        return digest.hexdigest()


def check_score_path(path: str | os.PathLike[str]) -> None:
    """Check a path before the scores are computed. Writes nothing.

    Raises:
        UsageError: `path` does not end in .npz.
        OutputError: There is a file that is not a score file of kdfast.
    """
    if Path(path).suffix != ".npz":
        raise UsageError(f"{path}: a score file must be named .npz")
    check_replaceable(path, _is_score_file)


def write_scores(path: str | os.PathLike[str], content: ScoreFile) -> None:
    """Write scores.npz atomically; plain numpy reads it: `np.load(path)["scores"]`.

    Args:
        path: The .npz file; its folder is created if missing.
        content: The content.

    Raises:
        UsageError: `path` does not end in .npz.
        DataError: Scores or extras are not one finite number per sample, or the other fields are of wrong types.
        OutputError: The file cannot be written, or would replace one that kdfast did not write.
    """
    check_score_path(path)
    scores = as_values(content.scores, None, _SCORES)
    extras = {name: as_values(values, len(scores), name) for name, values in content.extras.items()}
    content = replace(content, scores=scores, extras=extras)
    arrays = {_SCORES: content.scores, **{f"{_EXTRA}{name}": values for name, values in content.extras.items()}}
    about = {
        "format": _FORMAT,
        "method": content.method,
        "parameters": content.parameters,
        "data": content.data,
        "sources": content.sources,
        "seconds": content.seconds,
        "kdfast": kdfast.__version__,
    }
    try:
        text = json.dumps({**about, "digest": content.digest}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise DataError(f"`content` is not JSON ({error}): {_PLAIN}") from error
    check_type(json.loads(text), schemas.ScoresAbout, "`content`", advice=_PLAIN)
    check_writable(Path(path).parent)
    stored: dict[str, Any] = {**arrays, _ABOUT: np.array(text)}
    with atomic_write(path) as file:
        np.savez(file, **stored)


def read_scores(path: str | os.PathLike[str], *, n: int, fingerprint: str) -> ScoreFile:
    """Read scores.npz, and check that it belongs to the data.

    Args:
        path: The file.
        n: Number of training samples of the data.
        fingerprint: Fingerprint of the data.

    Raises:
        DataError: The file is missing, damaged, or not a score file (the message says how to bring other scores), has
            another length, belongs to other data, or is not finite.
    """
    if not Path(path).exists():
        raise DataError(f"there is no {path}: make it with kdfast score")
    if _is_foreign(Path(path)):
        raise DataError(
            f"{path} is not a score file of kdfast: score this data with kdfast score or, for scores of your own, call "
            f"write_scores('own.npz', ScoreFile(scores, 'own', '{fingerprint}')) of kdfast.prune.score_file, with one "
            "float64 per training sample, higher = harder"
        )
    arrays = read_npz(path, member_bytes=_MAX_BYTES, advice=_SCORE_AGAIN)
    about = _pop_about(arrays, path)
    scores = arrays.pop(_SCORES)
    if scores.shape != (n,):
        raise DataError(f"{path} holds {scores.size} scores, this data has {n} training samples: {_SCORE_AGAIN}")
    if about["data"] != fingerprint:
        raise DataError(
            f"{path} was made from other data (fingerprint {str(about['data'])[:12]}, this data {fingerprint[:12]}): "
            f"{_SCORE_AGAIN}"
        )
    extras = {name.removeprefix(_EXTRA): values for name, values in arrays.items() if name.startswith(_EXTRA)}
    for name, values in {_SCORES: scores, **extras}.items():
        check_values(values, n, f"{path}: {name}", advice=_SCORE_AGAIN)
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
        raise DataError(f"{path} has changed since it was written: its digest does not match: {_SCORE_AGAIN}")
    return content


def _is_foreign(path: Path) -> bool:
    """Return whether a file is not even a damaged score file: no .npz archive, or one without a description."""
    if not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{_ABOUT}.npy" not in archive.namelist()
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        with path.open("rb") as file:
            start = file.read(len(_ZIP))
        return bool(start) and start != _ZIP


def _is_score_file(path: Path) -> bool:
    """Return whether an .npz file has the description of a score file, of any version."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open(f"{_ABOUT}.npy") as file:
            # The description is a numpy string: four bytes a character.
            return _FAMILY.encode("utf-32-le") in file.read(_ABOUT_START)
    except (OSError, ValueError, KeyError, RuntimeError, NotImplementedError, EOFError, zlib.error, zipfile.BadZipFile):
        return False


def _pop_about(arrays: dict[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Remove the description from the arrays and return it."""
    foreign = DataError(f"{path} is not a score file of this version of kdfast: {_SCORE_AGAIN}")
    if _SCORES not in arrays or _ABOUT not in arrays or arrays[_ABOUT].shape != () or arrays[_ABOUT].dtype.kind != "U":
        raise foreign
    where = f"{path}: {_ABOUT}"
    about = decode_json(str(arrays.pop(_ABOUT)).encode(), Any, where, advice=_SCORE_AGAIN)
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise foreign
    check_type(about, schemas.ScoresAbout, where, advice=_SCORE_AGAIN)
    return about
