"""Plan of a cache: everything that determines its content. A build resumes only if its plan is unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import kdfast
from kdfast.data.arrays import rows_of
from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.views import ViewSpec
from kdfast.errors import CacheMismatch, OutputError, UsageError
from kdfast.files import check_unlocked, delete_own, has_format, refuse_links, visible_entries, write_sealed
from kdfast.files.arrays import row_blocks
from kdfast.nets.checkpoint import Model
from kdfast.teacher.manifest import (
    BUILDING,
    CLASSIFIER,
    COVERAGE,
    FEATURES,
    FORMAT,
    IDENTITY,
    MANIFEST,
    PLAN,
    SHARDS,
    TIMING,
    VERSION,
    compare_manifests,
    digest_ids,
    read_plan,
)

SHARD_BYTES = 64 << 20
# Of large images: random crops per sample, and classes of each.
_LARGE_SIDE, _LARGE_VIEWS, _LARGE_TOP_K = 64, 50, 10
DEFAULT_TEMPERATURE = 4.0
"""Temperature of a cache of the most probable classes, as of runs."""
# Limits what a kill can cost to a few minutes of a small teacher's work.
_SHARD_ROWS = 1 << 17


def default_views(spec: ViewSpec) -> int:
    """Return how many views of each sample to cache: all, but of random crops of large images only some."""
    return min(spec.count, _LARGE_VIEWS) if _is_large(spec) else spec.count


def default_top_k(spec: ViewSpec, classes: int) -> int:
    """Return how many classes of each view to cache: 0, all, but of random crops of large images only some."""
    # With fewer classes, all of them take no more space.
    return _LARGE_TOP_K if _is_large(spec) and classes > 2 * _LARGE_TOP_K + 1 else 0


def _is_large(spec: ViewSpec) -> bool:
    return spec.kind == "crop" and min(spec.size) >= _LARGE_SIDE


def describe_teacher(model: Model) -> dict[str, Any]:
    """Return what identifies a teacher in a cache."""
    norm = model.normalization
    return {"net": model.name, "digest": model.digest, "mean": list(norm.mean), "std": list(norm.std)}


def samples_per_shard(n_views: int, row_bytes: int, shard_bytes: int = SHARD_BYTES) -> int:
    """Return the samples of each shard but the last, for about `shard_bytes` of logits."""
    return max(1, min(shard_bytes // (n_views * row_bytes), _SHARD_ROWS // n_views))


def make_plan(
    source: Source, teacher: Mapping[str, Any], coverage: IntArray, n_views: int, view_seed: int
) -> dict[str, Any]:
    """Return what determines the cache's content, except how it is computed and stored.

    Raises:
        UsageError: The seed is negative.
    """
    if view_seed < 0:
        raise UsageError(f"`view_seed` is {view_seed}: pass 0 or more")
    return {
        "format": FORMAT,
        "version": VERSION,
        "kdfast": kdfast.__version__,
        "data": {
            "fingerprint": source.fingerprint,
            "samples": len(source.train),
            "classes": len(source.classes),
            "image": list(source.train.shape),
        },
        "teacher": dict(teacher),
        "views": {"spec": source.view_spec.to_dict(), "view_seed": view_seed, "n_views": n_views},
        "coverage": {
            "samples": len(coverage),
            "whole": len(coverage) == len(source.train),
            "digest": digest_ids(coverage),
        },
    }


def check_cache_folder(folder: Path) -> None:
    """Check that the folder is missing or empty, or holds a cache, finished or not. Writes nothing.

    Raises:
        OutputError: The folder holds something else, or a link in place of the folder of its unfinished parts.
    """
    refuse_links(folder, BUILDING)
    entries = [name for name in visible_entries(folder) if name != BUILDING]
    # The plan exists before any other file of a cache, and until the manifest is written: check in this order.
    if entries and not any(has_format(file, FORMAT) for file in (folder / BUILDING / PLAN, folder / MANIFEST)):
        raise OutputError(f"{folder} holds {entries[0]}, which is not part of a cache: choose an empty or new folder")


def is_finished(folder: Path) -> bool:
    """Return whether a folder holds a finished cache, intact or not."""
    return (folder / MANIFEST).exists()


def delete_cache(folder: Path) -> None:
    """Delete the cache in a folder, finished or not; files that are not part of it stay.

    Raises:
        OutputError: The folder holds something else, or another process uses it.
    """
    check_cache_folder(folder)
    for rank in folder.glob(f"{BUILDING}/rank-*"):
        check_unlocked(rank)
    delete_own(folder, (MANIFEST, TIMING, COVERAGE, FEATURES, IDENTITY, CLASSIFIER, BUILDING, SHARDS))


def write_or_check_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Write the plan, or check that the unfinished build in the folder has the same one.

    Raises:
        CacheMismatch: The folder holds an unfinished cache of another plan.
    """
    path = folder / BUILDING / PLAN
    if not path.exists():
        write_sealed(path, plan)
    # Read back even if just written: two ranks may start with different options at the same moment.
    check_same_plan(folder, read_plan(folder), plan, "an unfinished cache")


def check_same_plan(folder: Path, found: dict[str, Any], plan: dict[str, Any], what: str) -> None:
    """Raise CacheMismatch if the found plan differs, naming the fields; `what` describes it in the message."""
    # Plans of logits do not name their kind, as in files of earlier versions.
    if differing := compare_manifests({"kind": "logits", **found}, {"kind": "logits", **plan}):
        raise CacheMismatch(
            f"{folder} holds {what} with another plan: {'; '.join(differing)}. "
            "Use the same options or another folder, or delete it"
        )


def compute_accuracy(logits: npt.NDArray[np.float32], labels: IntArray) -> float:
    """Compute the top-1 accuracy, in percent, of logits (n, C) for labels (n,)."""
    correct = 0
    for part, block in row_blocks(logits, rows_of(logits)):
        correct += int(np.count_nonzero(block.argmax(1) == labels[part]))
    return 100 * float(correct) / len(labels)
