"""Manifest of a teacher's cache: its inputs and settings, and the SHA-256 of each of its files.

The plan of a cache holds everything that determines its content; a build resumes, and a finished cache is reused, only
for the same plan. The manifest is the plan plus the results of the build. It contains its own digest and is stored in
one canonical form, so that any changed byte is detected. Values that differ between runs, such as seconds, are in
`timing.json` instead, so that a killed and resumed build ends with the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.data.stateless_random import IntArray
from kdfast.errors import CacheMismatch, shorten
from kdfast.files import has_format, read_sealed, schemas
from kdfast.files.validate import check_type

FORMAT = "kdfast-cache"
TOKENS_FORMAT = "kdfast-tokens"
VERSION = 1
MANIFEST = "manifest.json"
TIMING = "timing.json"
COVERAGE = "coverage.npy"
SHARDS = "logits-*.npy"
FEATURES = "features.npy"
IDENTITY = "identity_logits.npy"
CLASSIFIER = "classifier.npy"
BUILDING = ".building"
IMPORTED = "imported"  # in place of the name of a network, where another program computed the logits
PLAN = "plan.json"
_BUILD_AGAIN = "delete the cache and build it again"


def shard_file(index: int) -> str:
    """Return the name of a shard's file of logits."""
    return f"logits-{index:05d}.npy"


def digest_ids(ids: IntArray) -> str:
    """Compute the SHA-256 (hexadecimal) of sample indices."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def read_sealed_json(path: Path, schema: type) -> dict[str, Any]:
    """Read a plan, timing or manifest file that `write_sealed` wrote.

    Args:
        path: The file.
        schema: What it must hold, a class of `kdfast.files.schemas`.

    Raises:
        CacheMismatch: The file is missing or damaged.
    """
    try:
        fields = read_sealed(path)
    except OSError as error:
        raise CacheMismatch(
            f"cannot read {path} ({error.strerror}): not a finished cache; build one with kdfast cache"
        ) from error
    except ValueError as error:
        raise CacheMismatch(f"{path} is damaged: its content does not match its own digest; {_BUILD_AGAIN}") from error
    check_type(fields, schema, path, error=CacheMismatch, advice=_BUILD_AGAIN)
    return fields


def read_plan(folder: Path) -> dict[str, Any]:
    """Read the plan of an unfinished cache.

    Raises:
        CacheMismatch: The plan is missing or damaged.
    """
    return read_sealed_json(folder / BUILDING / PLAN, schemas.CachePlan)


def read_timing(folder: Path) -> dict[str, Any]:
    """Read how long the build of a finished cache took.

    Raises:
        CacheMismatch: The file is missing or damaged.
    """
    return read_sealed_json(folder / TIMING, schemas.CacheTiming)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished cache.

    Raises:
        CacheMismatch: The manifest is missing, damaged, or has another format version.
    """
    refuse_tokens(folder)
    fields = read_sealed_json(folder / MANIFEST, schemas.FormatVersion)
    if (fields["format"], fields["version"]) != (FORMAT, VERSION):
        raise CacheMismatch(
            f"{folder} has cache format {fields['format']} {fields['version']}, this version of kdfast "
            f"reads {FORMAT} {VERSION}: build it again"
        )
    check_type(fields, schemas.CacheManifest, folder / MANIFEST, error=CacheMismatch, advice=_BUILD_AGAIN)
    return fields


def holds_format(folder: Path, name: str) -> bool:
    """Return whether a folder holds a cache of a format, finished or not."""
    # The plan exists until the manifest is written: look in this order.
    return any(has_format(file, name) for file in (folder / BUILDING / PLAN, folder / MANIFEST))


def refuse_tokens(folder: Path) -> None:
    """Check that a folder does not hold a cache of log-probabilities of texts.

    Raises:
        CacheMismatch: It does, finished or not.
    """
    if holds_format(folder, TOKENS_FORMAT):
        raise CacheMismatch(
            f"{folder} is a cache of log-probabilities of texts, and a teacher's cache of images is needed: check it "
            "with kdfast cache verify-tokens, and train on it in Python with kdfast.TokenTeacher"
        )


def compare_manifests(given: Mapping[str, Any], needed: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the fields of `needed` that differ in `given`, as "name is X, expected Y"; nested names as "a.b"."""
    lines = []
    for key, value in needed.items():
        other = given.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            lines += compare_manifests(other, value, f"{prefix}{key}.")
        elif other != value:
            lines.append(f"{prefix}{key} is {shorten(other)}, expected {shorten(value)}")
    return lines
