"""Files of a cache of log-probabilities: names, dtypes, plan and manifest.

The folder holds shards of texts. A shard of S texts with N tokens and E entries has these arrays:

| file | content |
|---|---|
| `values-<shard>.npy` | float16 (E,) log-probabilities; within a token, most probable class first |
| `ids-<shard>.npy` | uint16 (E,) classes, or uint32 for vocabularies above 65,536 |
| `offsets-<shard>.npy` | int64 (N + 1,) first entry of each token |
| `ranks-<shard>.npy` | uint16 (N,) how many entries of a token, from the first on, are the most probable classes |
| `tail-<shard>.npy` | float32 (N,) log-mass of the classes left out, computed before rounding |
| `labels-<shard>.npy` | int32 (N,) the tokens of the text, -1 where not known |
| `lengths-<shard>.npy` | int64 (S,) tokens of each text |
| `numbers-<shard>.npy` | int64 (S,) number of each text |

With `sampled`, the entries are classes that were drawn at random, each once, with the log of its share of the weights,
and `tail` is the log of the mean weight.

The plan holds everything that determines the content. `manifest.json` is the plan plus the sizes of the shards and the
SHA-256 of every file, and is written last; it contains its own digest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

import kdfast
from kdfast.errors import CacheMismatch, OutputError, UsageError
from kdfast.files import delete_own, read_sealed, refuse_links, schemas, visible_entries
from kdfast.files.validate import check_type
from kdfast.ops.kd_loss.validation import as_float, as_int, check_temperature
from kdfast.teacher.manifest import BUILDING, MANIFEST, holds_format
from kdfast.teacher.manifest import FORMAT as IMAGES_FORMAT
from kdfast.teacher.manifest import TOKENS_FORMAT as FORMAT

VERSION = 1
MAX_RANK = np.iinfo(np.uint16).max
_BUILD_AGAIN = "delete it and write the cache again"
_MAX_VOCABULARY = 2**31 - 1

PARTS = ("values", "ids", "offsets", "ranks", "tail", "labels", "lengths", "numbers")


def dtype_of(part: str, vocabulary: int) -> np.dtype[Any]:
    """Return the dtype of one of `PARTS`."""
    small_ids = "<u2" if vocabulary <= 1 << 16 else "<u4"
    dtypes = {"values": "<f2", "ids": small_ids, "ranks": "<u2", "tail": "<f4", "labels": "<i4"}
    return np.dtype(dtypes.get(part, "<i8"))


def part_file(part: str, shard: int) -> str:
    """Return the name of a file."""
    return f"{part}-{shard:05d}.npy"


def make_plan(
    vocabulary: object,
    temperature: object,
    sources: list[dict[str, Any]],
    options: Mapping[str, Any],
    sampled: bool = False,
) -> dict[str, Any]:
    """Return what determines a cache's content.

    Raises:
        UsageError: The vocabulary or the temperature is out of range.
    """
    size, divisor = as_int("vocabulary", vocabulary), as_float("temperature", temperature)
    if not 2 <= size <= _MAX_VOCABULARY:
        raise UsageError(f"`vocabulary` is {size}: pass the number of the teacher's tokens, 2 to {_MAX_VOCABULARY}")
    check_temperature(divisor, error=UsageError)
    plan = {
        "format": FORMAT,
        "version": VERSION,
        "kdfast": kdfast.__version__,
        "vocabulary": size,
        "temperature": float(divisor),
        "sources": sources,
        "options": dict(options),
    }
    return plan | ({"sampled": True} if sampled else {})


def check_folder(folder: Path) -> None:
    """Check that a folder is missing or empty, or holds a cache of log-probabilities, finished or not. Writes nothing.

    Raises:
        OutputError: The folder holds something else, or a link in place of the folder of its unfinished parts.
    """
    refuse_links(folder, BUILDING)
    entries = [name for name in visible_entries(folder) if name != BUILDING]
    if entries and not holds_format(folder, FORMAT):
        raise OutputError(
            f"{folder} holds {entries[0]}, which is not part of a cache of log-probabilities: choose an empty or new "
            "folder"
        )


def delete_tokens(folder: Path) -> None:
    """Delete the cache in a folder, finished or not.

    Raises:
        OutputError: The folder holds something else, or another process uses it.
    """
    check_folder(folder)
    delete_own(folder, (MANIFEST, BUILDING, *(f"{part}-*.npy" for part in PARTS)))


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a finished cache.

    Raises:
        CacheMismatch: The manifest is missing or damaged, or has another format or version.
    """
    if holds_format(folder, IMAGES_FORMAT):
        raise CacheMismatch(
            f"{folder} is a teacher's cache of images, and a cache of log-probabilities of texts is needed: check it "
            "with kdfast cache verify, and train on it with kdfast distill"
        )
    fields = read_sealed_file(folder / MANIFEST, schemas.FormatVersion)
    if (fields["format"], fields["version"]) != (FORMAT, VERSION):
        raise CacheMismatch(
            f"{folder} has cache format {fields['format']} {fields['version']}, and a cache of log-probabilities has "
            f"{FORMAT} {VERSION}: pass the folder that kdfast cache import-tokens wrote"
        )
    check_type(fields, schemas.TokenManifest, folder / MANIFEST, error=CacheMismatch, advice=_BUILD_AGAIN)
    return fields


def read_sealed_file(path: Path, schema: type) -> dict[str, Any]:
    """Read a plan or a manifest.

    Raises:
        CacheMismatch: The file is missing or damaged.
    """
    try:
        fields = read_sealed(path)
    except OSError as error:
        raise CacheMismatch(
            f"cannot read {path} ({error.strerror}): not a finished cache of log-probabilities; write one with kdfast "
            "cache import-tokens"
        ) from error
    except ValueError as error:
        raise CacheMismatch(f"{path} is damaged: its content does not match its own digest; {_BUILD_AGAIN}") from error
    check_type(fields, schema, path, error=CacheMismatch, advice=_BUILD_AGAIN)
    return fields
