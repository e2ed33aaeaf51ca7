"""The identity card of a teacher's cache: what it was made of, how, and the SHA-256 of each of its files.

The plan of a cache holds all that decides its content; a build is resumed, and a finished cache accepted, only for the
same plan. The manifest is the plan plus what was found out on the way. It holds its own digest and is stored in one
canonical form, so that any changed byte of it is noticed. It holds nothing that differs from run to run: seconds and
the like are in `timing.json`, and a build that was killed and resumed ends in the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.data.stateless_random import IntArray
from kdfast.errors import CacheMismatch
from kdfast.files import atomic_write

FORMAT = "kdfast-cache"
VERSION = 1
MANIFEST = "manifest.json"
TIMING = "timing.json"
COVERAGE = "coverage.npy"
FEATURES = "features.npy"
IDENTITY = "identity_logits.npy"
BUILDING = ".building"
PLAN = "plan.json"
_SELF = "sha256_of_the_rest"


def shard_file(index: int) -> str:
    """Name of a shard's file of logits."""
    return f"logits-{index:05d}.npy"


def digest_ids(ids: IntArray) -> str:
    """SHA-256 (hexadecimal) of sample indices."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def digest_fields(fields: Mapping[str, Any]) -> str:
    """SHA-256 (hexadecimal) of JSON values, whatever the order of keys."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, allow_nan=False).encode()).hexdigest()


def write_sealed(path: Path, fields: Mapping[str, Any]) -> None:
    """Write fields as JSON together with their digest, atomically.

    Raises:
        OutputError: The file cannot be written.
    """
    with atomic_write(path) as file:
        file.write(_canonical({**fields, _SELF: digest_fields(fields)}))


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises:
        CacheMismatch: The file is missing, or a byte of it has changed.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CacheMismatch(
            f"cannot read {path} ({error.strerror}): it is no finished cache; run kdfast cache"
        ) from error
    damaged = f"{path} is damaged: its content does not match its own digest; delete the cache and build it again"
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise CacheMismatch(damaged) from error
    if not isinstance(fields, dict) or _canonical(fields) != raw:
        raise CacheMismatch(damaged)
    if fields.pop(_SELF, None) != digest_fields(fields):
        raise CacheMismatch(damaged)
    return fields


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished cache.

    Raises:
        CacheMismatch: It is missing, damaged, or of another format version.
    """
    fields = read_sealed(folder / MANIFEST)
    if (fields.get("format"), fields.get("version")) != (FORMAT, VERSION):
        raise CacheMismatch(
            f"{folder} has cache format {fields.get('format')} {fields.get('version')}; needed: {FORMAT} {VERSION}; "
            "build it again with this kdfast"
        )
    return fields


def differences(given: Mapping[str, Any], needed: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The fields of `needed` that differ in `given`, as "name: given, needed" lines; nested fields as "a.b"."""
    lines = []
    for key, value in needed.items():
        other = given.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            lines += differences(other, value, f"{prefix}{key}.")
        elif other != value:
            lines.append(f"{prefix}{key} is {_short(other)}, needed {_short(value)}")
    return lines


def _canonical(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, indent=1, allow_nan=False).encode() + b"\n"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 24 else text[:17] + "..."
