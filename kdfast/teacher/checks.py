"""Check that a cache's files are intact and that it matches the data and the teacher in use."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kdfast.data.augment.presets import describe_views
from kdfast.data.source import Source
from kdfast.data.views import ViewSpec
from kdfast.errors import CacheMismatch, DataError
from kdfast.files import is_plain_name, sha256_file
from kdfast.nets.checkpoint import Model
from kdfast.teacher.manifest import IMPORTED, compare_manifests
from kdfast.teacher.plan import describe_teacher

_THREADS = 8


def check_match(
    folder: Path, manifest: dict[str, Any], source: Source | None, teacher: Model | None, *, views: bool = True
) -> None:
    """Compare a manifest with the data and the teacher in use; None is not compared, nor are the views without `views`.

    Raises:
        CacheMismatch: Fields differ; the message names all of them.
    """
    needed: dict[str, Any] = {}
    if source is not None:
        needed["data"] = {"fingerprint": source.fingerprint, "classes": len(source.classes)}
        if views:
            needed["views"] = {"spec": {"policy": None, **source.view_spec.to_dict()}}
    if teacher is not None:
        if manifest["teacher"]["net"] == IMPORTED:
            raise CacheMismatch(
                f"{folder} holds imported logits, whose teacher is not known: omit `teacher`, or build a cache of it"
            )
        needed["teacher"] = describe_teacher(teacher)
    differing = compare_manifests(manifest, needed)
    if source is not None and differing and all(line.startswith("views.") for line in differing):
        raise CacheMismatch(
            f"{folder} holds logits of views that are {describe_views(ViewSpec.from_dict(manifest['views']['spec']))}, "
            f"and this run's are {describe_views(source.view_spec)} ({'; '.join(differing)}): pass the `augment` that "
            "the cache was built with, or build one with this `augment`"
        )
    if differing:
        raise CacheMismatch(
            f"{folder} belongs to other data or another teacher: {'; '.join(differing)}. Use the cache of this data "
            "and teacher, or build one"
        )


def check_intact(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """Compare size and SHA-256 of every file with the manifest, on several threads.

    Raises:
        CacheMismatch: A file is missing or has changed.
    """

    def fault(name: str) -> str | None:
        if not is_plain_name(name):
            return f"{name!r} is no file of this folder"
        path = folder / name
        try:
            if path.stat().st_size != files[name]["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, expected {files[name]['bytes']}"
            return None if sha256_file(path) == files[name]["sha256"] else f"{name} has another SHA-256"
        except (OSError, DataError) as error:
            return f"{name} cannot be read ({error})"

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as pool:
        faults = [found for found in pool.map(fault, files) if found is not None]
    if faults:
        raise CacheMismatch(f"{folder} is damaged: {'; '.join(faults[:3])}. Delete it and build the cache again")
