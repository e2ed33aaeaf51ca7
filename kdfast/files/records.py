"""JSON files and digests.

A sealed record contains the digest of its other fields. A sealed (checksummed) file is in addition stored in one
canonical form, so that any changed byte is detected.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.errors import DataError, KdfastError
from kdfast.files.atomic import atomic_write
from kdfast.files.inputs import open_regular
from kdfast.files.validate import ADVICE, decode_json, read_regular

_CHUNK = 1 << 20
_DIGEST_KEY = "sha256_of_the_rest"


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, atomically.

    Raises:
        OutputError: The file cannot be written.
        ValueError: `obj` holds NaN or infinity, which JSON does not have.
    """
    text = json.dumps(obj, indent=2, allow_nan=False, ensure_ascii=False)
    with atomic_write(path) as file:
        # In JSON, the escape of a surrogate (a byte of a name that is not UTF-8) is that of a Python string.
        file.write(text.encode(errors="backslashreplace") + b"\n")


def read_json(
    path: str | os.PathLike[str],
    schema: Any = Any,
    *,
    error: type[KdfastError] = DataError,
    advice: str = ADVICE,
) -> Any:
    """Read a JSON file and check it.

    Args:
        path: The file.
        schema: What it must hold, a class of `kdfast.files.schemas`; Any for anything.
        error: The error to raise, for example CacheMismatch for a file of a cache.
        advice: The end of messages about the content, what to do.

    Raises:
        KdfastError: Of type `error`, if the file is missing, unreadable, not JSON, or does not fit the schema.
    """
    try:
        raw = read_regular(path)
    except OSError as exc:
        raise error(f"cannot read {path}: {exc.strerror or exc}") from exc
    return decode_json(raw, schema, Path(path), error=error, advice=advice)


def write_sealed(path: str | os.PathLike[str], fields: Mapping[str, Any]) -> None:
    """Write fields as JSON together with their digest, atomically.

    Raises:
        OutputError: The file cannot be written.
        ValueError: A field holds NaN or infinity.
    """
    content = _canonical({**fields, _DIGEST_KEY: sha256_json(fields)})
    with atomic_write(path) as file:
        file.write(content)


def seal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return JSON fields with their digest.

    Raises:
        ValueError: A field holds NaN or infinity.
    """
    plain = json.loads(json.dumps(dict(fields), allow_nan=False))  # keys and tuples as they are read again
    return {**plain, _DIGEST_KEY: sha256_json(plain)}


def matches_seal(fields: Mapping[str, Any]) -> bool:
    """Return whether fields are those that were sealed; True without a digest, as in records of earlier versions."""
    return _DIGEST_KEY not in fields or fields[_DIGEST_KEY] == sha256_json(without_seal(fields))


def without_seal(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields without their digest."""
    return {name: value for name, value in fields.items() if name != _DIGEST_KEY}


def read_sealed(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file that `write_sealed` wrote, and check its digest.

    Raises:
        OSError: The file cannot be read.
        ValueError: The content does not match its digest.
    """
    raw = read_regular(path)
    fields = decode_json(raw, Any, Path(path))
    try:
        sealed = isinstance(fields, dict) and _canonical(fields) == raw
        sealed = sealed and fields.pop(_DIGEST_KEY, None) == sha256_json(fields)
    except RecursionError:
        sealed = False
    if not sealed:
        raise ValueError(f"{path} does not match its own digest")
    return dict(fields)


def has_format(path: str | os.PathLike[str], name: str) -> bool:
    """Return whether a file, damaged or not, names itself a file of a format, as "format": "NAME"; False if missing."""
    try:
        return re.search(rb'"format": *"%s"' % re.escape(name.encode()), read_regular(path)) is not None
    except OSError:
        return False


def sha256_json(fields: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of JSON values, independent of the order of keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, allow_nan=False).encode()).hexdigest()


def sha256_file(path: str | os.PathLike[str]) -> str:
    """SHA-256 (hexadecimal) of a file's bytes.

    Raises:
        DataError: The file cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as exc:
        raise DataError(f"cannot read {path}: {exc.strerror or exc}") from exc
    return digest.hexdigest()


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=1, allow_nan=False).encode() + b"\n"
