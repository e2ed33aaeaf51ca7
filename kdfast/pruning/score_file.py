"""scores.npz: one score per training sample, with its provenance. Scores of other programs are read too."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import kdfast
from kdfast.data.arrays import as_values
from kdfast.data.source import Source, sample_files
from kdfast.data.stateless_random import IntArray
from kdfast.errors import DataError, UsageError
from kdfast.files import atomic_write, check_replaceable, check_writable, schemas, sha256_file
from kdfast.files.arrays import read_npz
from kdfast.files.validate import check_type, decode_json
from kdfast.pruning.own_scores import read_own_scores
from kdfast.pruning.own_scores.formats import LOADERS, can_read
from kdfast.pruning.rules.base import FloatArray
from kdfast.pruning.scores.base import check_values

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
        method: A key of `kdfast.pruning.scores.registry.SCORES`, or another name.
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
    def origin(self) -> dict[str, Any]:
        """What the scores were computed from and how, as JSON values; the same for the same command."""
        head = {"method": self.method, "data": self.data, "parameters": self.parameters, "sources": self.sources}
        plain: dict[str, Any] = json.loads(json.dumps(head))
        return plain

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


def read_origin(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """Return the `ScoreFile.origin` of a score file, or None if there is no file.

    Raises:
        DataError: It is damaged, or no score file.
    """
    if not os.path.exists(path):
        return None
    about = _pop_about(read_npz(path, member_bytes=_MAX_BYTES, advice=_SCORE_AGAIN), path)
    return {name: about[name] for name in ("method", "data", "parameters", "sources")}


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


def open_scores(
    path: str | os.PathLike[str], source: Source, *, key: str | None = None, higher: str | None = None
) -> ScoreFile:
    """Read the scores of a source's training split; arguments and errors as for `read_scores`."""
    return read_scores(
        path,
        n=len(source.train),
        fingerprint=source.fingerprint,
        key=key,
        higher=higher,
        files=sample_files(source.train),
        labels=source.train.labels,
    )


def read_scores(
    path: str | os.PathLike[str],
    *,
    n: int,
    fingerprint: str,
    key: str | None = None,
    higher: str | None = None,
    files: Sequence[str] | None = None,
    labels: IntArray | None = None,
) -> ScoreFile:
    """Read scores.npz, and check that it belongs to the data; or read the scores of another program.

    Args:
        path: The file: scores.npz, or one that `kdfast.pruning.own_scores` reads.
        n: Number of training samples of the data.
        fingerprint: Fingerprint of the data.
        key: Which array of another program's file holds the scores. None: the only one.
        higher: What a high score in another program's file means, "hard" or "easy". None: hard.
        files: The path of each training sample, which paths in the file are compared with. None: the samples are no
            files.
        labels: int64 (n,), the class of each sample, to tell them from scores. None: not compared.

    Raises:
        DataError: The file is missing, damaged, or of another kind (the message says how to bring other scores), has
            another length, belongs to other data, is not finite, or may be read in two ways.
        UsageError: `key` or `higher` is wrong, missing, or given for scores of kdfast.
    """
    file = Path(path)
    if not file.exists():
        raise DataError(f"there is no {path}: make it with kdfast score")
    if is_foreign(file):
        if not can_read(file) or (file.suffix.lower() == ".npz" and not zipfile.is_zipfile(file)):
            raise DataError(
                f"{path} is not a score file of kdfast, nor one of {', '.join(LOADERS)} as other programs write them: "
                f"score this data with kdfast score or, for scores of your own, call write_scores('own.npz', "
                f"ScoreFile(scores, 'own', '{fingerprint}')) of kdfast.pruning.score_file, with one float64 per "
                "training sample, higher = harder"
            )
        own = read_own_scores(file, n=n, key=key, higher=higher, files=files, labels=labels)
        return ScoreFile(own.values, own.name, fingerprint, {}, own.parameters, {"score file": sha256_file(file)})
    for name, value in (("key", key), ("higher", higher)):
        if value is not None:
            raise UsageError(f"{path} was written by kdfast, so higher = harder and it has one score: omit `{name}`")
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


def is_foreign(path: Path) -> bool:
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
