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
from kdfast.teacher.writing.shards import ShardBuilder, ShardFiles

EXTRAS = (COVERAGE, CLASSIFIER)


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
    join_shards(builder)
    extras = write_extras(builder, plan, model)
    identity = read_npy(builder.folder / IDENTITY, mmap_mode="r", error=CacheMismatch)
    test = evaluate(model, source.test, device=builder.predictor.device, view_spec=source.view_spec)
    train_top1 = compute_accuracy(identity, source.train.labels[builder.coverage])
    return seal_shards(builder, plan, extras, {"train_top1": train_top1, "test_top1": test["top1"]})


def write_extras(builder: ShardBuilder, plan: dict[str, Any], model: Model) -> list[str]:
    """Write the arrays that no shard has a part of, of `EXTRAS`, and return their names.

    Raises:
        OutputError: A file cannot be written.
    """
    names = []
    if not plan["coverage"]["whole"]:
        with atomic_write(builder.folder / COVERAGE) as file:
            np.save(file, builder.coverage)
        names.append(COVERAGE)
    if builder.rows.features:
        with atomic_write(builder.folder / CLASSIFIER) as file:
            np.save(file, LinearHead.of(model.net).as_array())
        names.append(CLASSIFIER)
    return names


def join_shards(shards: ShardFiles) -> None:
    """Write the features and the identity view's logits of all shards as arrays.

    Raises:
        OutputError: A file cannot be written.
        CacheMismatch: A part of a shard is damaged.
    """
    _concatenate_parts(shards, "features", FEATURES)
    _concatenate_parts(shards, "identity", IDENTITY)


def seal_shards(shards: ShardFiles, plan: dict[str, Any], extras: list[str], results: dict[str, Any]) -> float:
    """Write the manifest of a cache whose other files are written, and return the seconds spent on all shards.

    Args:
        shards: The shards, all of them done.
        plan: The cache's plan, which the manifest extends.
        extras: Names of the files of `EXTRAS`.
        results: The teacher's accuracies.

    Raises:
        OutputError: A file cannot be written.
    """
    folder = shards.folder
    records = [record for shard in range(shards.shard_count) if (record := shards.read_record(shard)) is not None]
    digests = {shard_file(shard): record["files"][shard_file(shard)] for shard, record in enumerate(records)}
    digests |= {name: sha256_file(folder / name) for name in (FEATURES, IDENTITY, *extras)}
    width = int(read_npy(folder / FEATURES, mmap_mode="r", error=CacheMismatch).shape[1])
    seconds = sum(float(record["seconds"]) for record in records)
    images = len(shards.coverage) * int(plan["views"]["n_views"])
    seal_cache(folder, plan, results | {"features": width}, digests, seconds=seconds, images=images)
    return seconds


def _concatenate_parts(shards: ShardFiles, kind: str, name: str) -> None:
    """Write the shards' parts one after another as one array, with at most one of them in memory."""
    width = read_npy(shards.part_path(kind, 0), mmap_mode="r", error=CacheMismatch).shape[1]
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(shards.coverage), width)}
    with atomic_write(shards.folder / name) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in range(shards.shard_count):
            file.write(read_npy(shards.part_path(kind, shard), error=CacheMismatch).data)
