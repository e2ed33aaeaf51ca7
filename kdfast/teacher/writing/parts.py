"""Parts of a cache in folders of their own, as jobs without a shared folder write them, and their merger.

A process that has done its shards leaves a record of its part: whose it is, and what the manifest needs beside the
shards, so that merging needs neither the data nor the teacher.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.data.source import Source
from kdfast.errors import CacheMismatch, UsageError
from kdfast.files import (
    FolderLock,
    atomic_path,
    check_unlocked,
    check_writable,
    make_subfolder,
    schemas,
    sha256_file,
    sha256_json,
    write_sealed,
)
from kdfast.files.arrays import read_npy
from kdfast.files.space import check_space
from kdfast.nets.checkpoint import Model
from kdfast.progress import Progress
from kdfast.teacher.checks import check_intact
from kdfast.teacher.evaluate import evaluate
from kdfast.teacher.manifest import (
    BUILDING,
    COVERAGE,
    MANIFEST,
    TIMING,
    compare_manifests,
    read_manifest,
    read_plan,
    read_sealed_json,
)
from kdfast.teacher.plan import check_cache_folder, write_or_check_plan
from kdfast.teacher.writing.finish import EXTRAS, join_shards, reuse_finished, seal_shards, write_extras
from kdfast.teacher.writing.shards import ShardBuilder, ShardFiles

_RUN_AGAIN = "run its kdfast cache --shard command again"


@dataclass(frozen=True)
class _Part:
    """A finished part and the folder that holds it; `extras` are digests by name, of files of `EXTRAS`."""

    folder: Path
    rank: int
    world: int
    correct: int
    test_top1: float | None
    extras: dict[str, str]

    def __str__(self) -> str:
        return f"{self.rank}/{self.world}"


def write_part(
    builder: ShardBuilder, plan: dict[str, Any], source: Source, model: Model, rank: int, world: int
) -> None:
    """Write the record of a process's part, whose shards are done; the first also evaluates the teacher.

    Raises:
        OutputError: A file cannot be written.
    """
    correct = 0
    for shard in range(rank, builder.shard_count, world):
        logits = read_npy(builder.part_path("identity", shard), error=CacheMismatch)
        labels = source.train.labels[builder.sample_ids(shard)]
        correct += int(np.count_nonzero(logits.argmax(1) == labels))
    top1, extras = None, {}
    if rank == 0:
        extras = {name: sha256_file(builder.folder / name) for name in write_extras(builder, plan, model)}
        top1 = evaluate(model, source.test, device=builder.predictor.device, view_spec=source.view_spec)["top1"]
    fields = {"plan": builder.plan_digest, "rank": rank, "world": world, "correct": correct, "test_top1": top1}
    write_sealed(builder.folder / BUILDING / f"part-{rank:05d}.json", fields | {"extras": extras})


def merge_parts(folders: Sequence[Path], out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Make one cache of its parts, with the bytes of a cache that one process has built. The same call resumes.

    Every file is compared with its digest; the parts stay. Of a cache of a single shard, one part is already whole: it
    is copied.

    Args:
        folders: The parts, which `build_cache` has written with `part`.
        out: The folder of the cache; created if missing.
        progress: Called with (shards done, shards in total, note).

    Returns:
        The cache's plan.

    Raises:
        UsageError: The folder of the cache is one of the parts.
        CacheMismatch: Parts are of different caches, missing, given twice, unfinished or damaged; or the folder holds
            another cache.
        OutputError: The folder cannot be written, is too small, or holds something else; or a process still builds.
    """
    if any(out.resolve() == folder.resolve() for folder in folders):
        raise UsageError(f"`out` is {out}, which is one of the parts: choose a new folder")
    whole = [folder for folder in folders if (folder / MANIFEST).exists()]
    unfinished = [folder for folder in folders if folder not in whole]
    if not unfinished:
        raise CacheMismatch(
            f"{folders[0]} is a whole cache: use it as it is, and merge parts that kdfast cache --shard has written"
        )
    plan = _read_plans(unfinished)
    for folder in whole:
        _check_same_cache(folder, read_manifest(folder), unfinished[0], plan)
    digest = sha256_json(plan)
    parts = [] if whole else _check_complete([part for folder in folders for part in _read_parts(folder, digest)])
    check_cache_folder(out)
    if (out / MANIFEST).exists():
        reuse_finished(out, plan)
    elif whole:
        _copy_whole(whole[0], out, plan)
    else:
        _merge(folders, parts, plan, out, progress)
    return plan


def _merge(
    folders: Sequence[Path], parts: list[_Part], plan: dict[str, Any], out: Path, progress: Progress | None
) -> None:
    """Copy the shards of all parts to a folder and finish the cache."""
    size = sum(file.stat().st_size for folder in folders for file in folder.rglob("*.npy"))
    coverage = np.arange(plan["coverage"]["samples"], dtype=np.int64)
    if not plan["coverage"]["whole"]:
        coverage = read_npy(parts[0].folder / COVERAGE, shape=coverage.shape, dtype=np.int64, error=CacheMismatch)
    merged = ShardFiles(out, sha256_json(plan), coverage, plan["per_shard"])
    with _building(out, plan, size):
        extras = [name for name in EXTRAS if name in parts[0].extras]
        for name in extras:
            _copy_extra(parts[0], name, out)
        for shard in range(merged.shard_count):
            _copy_shard(merged, parts[shard % len(parts)].folder, shard)
            if progress is not None:
                progress(shard + 1, merged.shard_count, "merging")
        join_shards(merged)
        correct = sum(part.correct for part in parts)
        results = {"train_top1": 100 * float(correct) / len(coverage), "test_top1": parts[0].test_top1}
        seal_shards(merged, plan, extras, results)


def _copy_whole(folder: Path, out: Path, plan: dict[str, Any]) -> None:
    """Copy a finished cache, its manifest last.

    Raises:
        CacheMismatch: A file is missing or damaged.
    """
    files = read_manifest(folder)["files"]
    check_intact(folder, files)
    with _building(out, plan, sum(file["bytes"] for file in files.values())):
        for name in (*files, TIMING, MANIFEST):
            _copy(folder / name, out / name)


@contextlib.contextmanager
def _building(out: Path, plan: dict[str, Any], size: int) -> Iterator[None]:
    """Hold the lock of a folder while a cache of so many bytes is written to it; then delete what served to resume."""
    check_space(out, size, "the cache")
    check_writable(out)
    make_subfolder(out, BUILDING)
    with FolderLock(out / BUILDING):
        write_or_check_plan(out, plan)
        yield
    shutil.rmtree(out / BUILDING)


def _read_plans(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the plan of all parts, which must be the same, and check that no process still works on them."""
    plans = []
    for folder in folders:
        plans.append(read_plan(folder))
        for rank in folder.glob(f"{BUILDING}/rank-*"):
            check_unlocked(rank)
        _check_same_cache(folder, plans[-1], folders[0], plans[0])
    return plans[0]


def _check_same_cache(folder: Path, found: dict[str, Any], first: Path, plan: dict[str, Any]) -> None:
    """Check that a folder's plan or manifest agrees with the plan of the first part."""
    # Plans of logits do not name their kind.
    if differing := compare_manifests({"kind": "logits", **found}, {"kind": "logits", **plan}):
        raise CacheMismatch(
            f"{folder} is a part of another cache than {first}: {'; '.join(differing)}. Merge parts that were "
            "made with the same options"
        )


def _read_parts(folder: Path, digest: str) -> list[_Part]:
    """Return the finished parts in a folder."""
    parts = []
    for path in sorted(folder.glob(f"{BUILDING}/part-*.json")):
        fields = read_sealed_json(path, schemas.CachePart)
        if fields.pop("plan") == digest:
            parts.append(_Part(folder, **fields))
    if not parts:
        raise CacheMismatch(f"{folder} holds no finished part: {_RUN_AGAIN}")
    return parts


def _check_complete(parts: list[_Part]) -> list[_Part]:
    """Return the parts in their order, if each is there once.

    Raises:
        CacheMismatch: They are of different divisions, one is there twice, or one is missing.
    """
    found: dict[int, _Part] = {}
    for part in parts:
        if part.world != parts[0].world:
            raise CacheMismatch(
                f"{parts[0].folder} holds part {parts[0]}, and {part.folder} part {part}: merge parts of one division"
            )
        if part.rank in found:
            raise CacheMismatch(f"part {part} is in {found[part.rank].folder} and in {part.folder}: pass one of them")
        found[part.rank] = part
    world = parts[0].world
    missing = [f"{rank}/{world}" for rank in range(world) if rank not in found]
    if missing:
        raise CacheMismatch(f"of {world} parts, these are not given: {', '.join(missing)}; pass the folders of all")
    return [found[rank] for rank in range(world)]


def _copy_shard(merged: ShardFiles, folder: Path, shard: int) -> None:
    """Copy a shard unless it is there already, and compare it with its digests.

    Raises:
        CacheMismatch: It is missing or damaged.
    """
    if merged.is_done(shard):
        return
    held = ShardFiles(folder, merged.plan_digest, merged.coverage, merged.per_shard)
    try:
        for source, target in zip(held.paths(shard), merged.paths(shard), strict=True):
            _copy(source, target)
    except FileNotFoundError:
        pass  # it cannot be done, then
    if not merged.is_done(shard):
        raise CacheMismatch(f"shard {shard} in {folder} is missing or damaged: {_RUN_AGAIN}")


def _copy_extra(part: _Part, name: str, out: Path) -> None:
    """Copy an array that no shard has a part of, and compare it with its digest.

    Raises:
        CacheMismatch: It is missing or damaged.
    """
    source, target = part.folder / name, out / name
    with contextlib.suppress(FileNotFoundError):
        _copy(source, target)
    if not target.is_file() or sha256_file(target) != part.extras[name]:
        raise CacheMismatch(f"{source} is missing or damaged: {_RUN_AGAIN}")


def _copy(source: Path, target: Path) -> None:
    with atomic_path(target) as temporary:
        shutil.copyfile(source, temporary)
