"""Finish a cache whose shards are done: concatenate their parts, evaluate the teacher, and write the manifest."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kdfast.data.source import Source
from kdfast.errors import CacheMismatch
from kdfast.files import atomic_write, sha256_file, write_sealed
from kdfast.files.arrays import read_npy
from kdfast.nets.checkpoint import Model
from kdfast.nets.head import LinearHead
from kdfast.teacher.checks import check_intact
from kdfast.teacher.evaluate import evaluate
from kdfast.teacher.manifest import (
    BUILDING,
    CLASSIFIER,
    COVERAGE,
    FEATURES,
    IDENTITY,
    MANIFEST,
    TIMING,
    read_manifest,
    read_timing,
    shard_file,
)
from kdfast.teacher.plan import check_same_plan, compute_accuracy
from kdfast.teacher.writing.shards import ShardBuilder


def reuse_finished(folder: Path, plan: dict[str, Any]) -> float:
    """Accept a finished cache that has the same plan and intact files, and return the seconds that it took.

    Raises:
        CacheMismatch: The plan differs, or a file has changed.
    """
    manifest = read_manifest(folder)
    check_same_plan(folder, manifest, plan, "a finished cache")
    check_intact(folder, manifest["files"])
    shutil.rmtree(folder / BUILDING, ignore_errors=True)  # remains of a kill between the manifest and the cleanup
    return float(read_timing(folder)["seconds"])


def seal_cache(
    folder: Path, plan: dict[str, Any], results: dict[str, Any], digests: dict[str, str], *, seconds: float, images: int
) -> None:
    """Write the timing and, last, the manifest, with the digests of the cache's files by name.

    Raises:
        OutputError: A file cannot be written.
    """
    files = {name: {"sha256": sha, "bytes": (folder / name).stat().st_size} for name, sha in digests.items()}
    write_sealed(folder / TIMING, {"seconds": seconds, "images": images, "torch": torch.__version__})
    write_sealed(folder / MANIFEST, plan | results | {"files": files})


def write_manifest(builder: ShardBuilder, plan: dict[str, Any], source: Source, model: Model) -> float:
    """Write the arrays of a cache whose shards are done, and the manifest last.

    Args:
        builder: Builder of the shards.
        plan: The cache's plan, which the manifest extends.
        source: The data; the teacher is evaluated on its test split.
        model: The teacher.

    Returns:
        Seconds spent on all shards.

    Raises:
        OutputError: A file cannot be written.
        CacheMismatch: A part of a shard is damaged.
    """
    folder, coverage = builder.folder, builder.coverage
    records = [record for shard in range(builder.shard_count) if (record := builder.read_record(shard)) is not None]
    digests = {shard_file(shard): record["files"][shard_file(shard)] for shard, record in enumerate(records)}
    _concatenate_parts(builder, "features", FEATURES)
    _concatenate_parts(builder, "identity", IDENTITY)
    names = [FEATURES, IDENTITY]
    if not plan["coverage"]["whole"]:
        with atomic_write(folder / COVERAGE) as file:
            np.save(file, coverage)
        names.append(COVERAGE)
    if builder.rows.features:
        with atomic_write(folder / CLASSIFIER) as file:
            np.save(file, LinearHead.of(model.net).as_array())
        names.append(CLASSIFIER)
    digests |= {name: sha256_file(folder / name) for name in names}
    identity = read_npy(folder / IDENTITY, mmap_mode="r", error=CacheMismatch)
    test = evaluate(model, source.test, device=builder.predictor.device, view_spec=source.view_spec)
    results = {
        "train_top1": compute_accuracy(identity, source.train.labels[coverage]),
        "test_top1": test["top1"],
        "features": int(read_npy(folder / FEATURES, mmap_mode="r", error=CacheMismatch).shape[1]),
    }
    seconds = sum(float(record["seconds"]) for record in records)
    images = len(coverage) * builder.n_views
    seal_cache(folder, plan, results, digests, seconds=seconds, images=images)
    return seconds


def _concatenate_parts(builder: ShardBuilder, kind: str, name: str) -> None:
    """Write the shards' parts one after another as one array, with at most one of them in memory."""
    width = read_npy(builder.part_path(kind, 0), mmap_mode="r", error=CacheMismatch).shape[1]
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(builder.coverage), width)}
    with atomic_write(builder.folder / name) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in range(builder.shard_count):
            file.write(read_npy(builder.part_path(kind, shard), error=CacheMismatch).data)
