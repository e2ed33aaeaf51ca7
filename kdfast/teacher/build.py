"""Building a teacher's cache: its plan, its shards, and at last its manifest."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from kdfast.data.source import Source, epoch_ids
from kdfast.errors import CacheMismatch, DataError, Interrupted, OutputError, UsageError
from kdfast.files import FolderLock, atomic_write, check_writable, sha256_file
from kdfast.nets.checkpoint import Model
from kdfast.teacher import manifest as card
from kdfast.teacher.checks import require_sound
from kdfast.teacher.evaluate import evaluate
from kdfast.teacher.forward import Forward, Precision, default_batch
from kdfast.teacher.manifest import BUILDING
from kdfast.teacher.plan import agree_on_plan, check_place, make_plan, require_same, train_accuracy
from kdfast.teacher.rows import Rows, TopK
from kdfast.teacher.shards import Job

Dtype = Literal["float16", "float32"]
Progress = Callable[[int, int, str], None]

_SHARD_BYTES = 64 << 20
# Some minutes of a small teacher's work: what a kill may cost at most.
_SHARD_ROWS = 1 << 17


@dataclass(frozen=True)
class CacheBuild:
    """What a call of `build_cache` did.

    Attributes:
        path: The cache's folder.
        complete: Whether the manifest is there; False while other ranks are still at work.
        computed: Shards computed by this call.
        kept: Shards of this rank that were there already and sound.
        seconds: Time spent on all shards so far, by all calls and ranks; 0 while incomplete.
    """

    path: Path
    complete: bool
    computed: int
    kept: int
    seconds: float


def build_cache(
    source: Source,
    model: Model,
    out: str | os.PathLike[str],
    *,
    ids: npt.ArrayLike | None = None,
    n_views: int | None = None,
    view_seed: int = 0,
    dtype: Dtype = "float16",
    top_k: TopK | None = None,
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    shard_bytes: int = _SHARD_BYTES,
    progress: Progress | None = None,
) -> CacheBuild:
    """Write, or go on writing, what a teacher says about every view of every training sample.

    The same call resumes an interrupted build: finished shards are verified and kept, and the result has the same bytes
    as that of an uninterrupted build. Several processes share the work when each gets its `rank` of `world`; the one
    that finishes last writes the manifest.

    Args:
        source: The data.
        model: The teacher.
        out: The cache's folder; made if need be.
        ids: Original indices of the samples to cover, in any order; the whole training split when not given.
        n_views: Views per sample, chosen by `view_table`; all there are when not given.
        view_seed: Seed of that choice.
        dtype: Of the stored logits. float16 errs by at most 1 in 2,048.
        top_k: Keep only the most probable classes of each view, for very many classes. The identity view's logits are
            kept whole beside them, as scores need them.
        precision: "bfloat16" computes views other than the identity in bfloat16, several times as fast on CPUs with
            matrix units and on GPUs, with an error far above float16's rounding. The identity view is always float32.
        device: Where to compute.
        batch_size: Images per forward pass; one that suits the device when not given.
        rank: Which of the processes this is.
        world: Number of processes.
        shard_bytes: Size of a shard's file of logits, about.
        progress: Called with (images done, images in all, note) as this process advances.

    Returns:
        What was done.

    Raises:
        UsageError: An option does not make sense.
        SubsetError: `ids` are no distinct indices of training samples.
        CacheMismatch: The folder holds another cache, finished or not, or a damaged one, or the teacher does not fit
            the data.
        DataError: A logit is not finite, or too large for float16.
        OutputError: The folder cannot be written, holds something else, or another process is building in it.
        Interrupted: Ctrl-C; the same call goes on.
    """
    place = torch.device(device)
    count = source.views.count if n_views is None else n_views
    check_build(source, model, out, count, dtype, precision, top_k, rank, world)
    coverage = np.arange(len(source.train), dtype=np.int64)
    if ids is not None:
        coverage = np.sort(epoch_ids(ids, len(source.train), 1))
    batch = batch_size or default_batch(place)
    rows = Rows(model.classes, np.dtype(dtype), top_k)
    per_shard = max(1, min(shard_bytes // (count * rows.row_bytes), _SHARD_ROWS // count))
    plan = make_plan(source, model, coverage, count, view_seed)
    plan |= {"dtype": dtype, "precision": precision, "batch_size": batch, "device": place.type, "per_shard": per_shard}
    plan |= {"top_k": None if top_k is None else dataclasses.asdict(top_k)}
    folder = check_writable(out)
    if (folder / card.MANIFEST).exists():
        return _already_there(folder, plan)
    job = Job(
        folder=folder,
        plan_digest=card.digest_fields(plan),
        split=source.train,
        forward=Forward(model, source.views, place, batch),
        spec=source.views,
        view_seed=view_seed,
        n_views=count,
        rows=rows,
        precision=precision,
        coverage=coverage,
        per_shard=per_shard,
    )
    lock_folder = check_writable(folder / BUILDING / f"rank-{rank}")
    agree_on_plan(folder, plan)
    try:
        with FolderLock(lock_folder):
            computed, kept = _write_shards(job, range(rank, job.count, world), progress)
            return _finish(job, plan, source, model, computed, kept, alone=world == 1)
    except DataError:
        if world == 1 and not any(job.record(shard) for shard in range(job.count)):
            shutil.rmtree(folder / BUILDING)  # nothing to go on from: other options may be tried in this folder
        raise
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"stopped; the same command resumes the cache in {folder} after its finished shards"
        ) from stop


def check_build(
    source: Source,
    model: Model,
    out: str | os.PathLike[str],
    n_views: int,
    dtype: str,
    precision: str,
    top_k: TopK | None,
    rank: int = 0,
    world: int = 1,
) -> None:
    """Refuse what `build_cache` would refuse at once; arguments as there. Nothing is written.

    Raises:
        UsageError, CacheMismatch, OutputError: As there.
    """
    if top_k is not None:
        top_k.check(model.classes)
    if dtype not in get_args(Dtype):
        raise UsageError(f"dtype {dtype!r}: must be one of {', '.join(get_args(Dtype))}")
    if precision not in get_args(Precision):
        raise UsageError(f"precision {precision!r}: must be one of {', '.join(get_args(Precision))}")
    if not 1 <= n_views <= source.views.count:
        raise UsageError(f"{n_views} views per sample: this data has {source.views.count}; give 1 to that many")
    if not 0 <= rank < world:
        raise UsageError(f"rank {rank} of {world}: ranks go from 0 to world - 1")
    if model.classes != len(source.classes):
        raise CacheMismatch(
            f"the teacher ({model.name}) knows {model.classes} classes, the data {source.path} has "
            f"{len(source.classes)}: give a teacher trained on this data"
        )
    check_place(Path(out))


def _already_there(folder: Path, plan: dict[str, Any]) -> CacheBuild:
    """Accept a finished cache of the same plan whose files are whole."""
    found = card.read_manifest(folder)
    require_same(folder, found, plan, "a finished cache")
    require_sound(folder, found["files"])
    shutil.rmtree(folder / BUILDING, ignore_errors=True)  # left by a kill between the manifest and the cleaning up
    return CacheBuild(folder, True, 0, 0, float(card.read_sealed(folder / card.TIMING)["seconds"]))


def _write_shards(job: Job, shards: range, progress: Progress | None) -> tuple[int, int]:
    """Bring the shards of this rank about; returns how many were computed and how many were there."""
    total = sum(len(job.ids(shard)) for shard in shards) * job.n_views
    done = computed = kept = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total, f"shard {computed + kept + 1} of {len(shards)}")

    for shard in shards:
        if job.is_sound(shard):
            advance(len(job.ids(shard)) * job.n_views)
            kept += 1
        else:
            job.write(shard, advance)
            computed += 1
    return computed, kept


def _finish(
    job: Job, plan: dict[str, Any], source: Source, model: Model, computed: int, kept: int, *, alone: bool
) -> CacheBuild:
    """Write the manifest if all shards are there and no other rank is at it."""
    unfinished = CacheBuild(job.folder, False, computed, kept, 0.0)
    if any(job.record(shard) is None for shard in range(job.count)):
        # Records vanish when another rank has just completed the cache.
        return _by_another(job.folder, plan, computed, kept) or unfinished
    try:
        with FolderLock(job.folder / BUILDING):
            seconds = _seal(job, plan, source, model)
    except OutputError:
        # Another rank holds the lock, or has completed the cache and removed the lock's folder.
        if alone:
            raise
        return _by_another(job.folder, plan, computed, kept) or unfinished
    shutil.rmtree(job.folder / BUILDING)
    return CacheBuild(job.folder, True, computed, kept, seconds)


def _by_another(folder: Path, plan: dict[str, Any], computed: int, kept: int) -> CacheBuild | None:
    if not (folder / card.MANIFEST).exists():
        return None
    return CacheBuild(folder, True, computed, kept, _already_there(folder, plan).seconds)


def _seal(job: Job, plan: dict[str, Any], source: Source, model: Model) -> float:
    """Join the parts of the shards, and write the manifest last."""
    records = [record for shard in range(job.count) if (record := job.record(shard)) is not None]
    files = {card.shard_file(shard): record["files"][card.shard_file(shard)] for shard, record in enumerate(records)}
    _join(job, "features", card.FEATURES)
    _join(job, "identity", card.IDENTITY)
    names = [card.FEATURES, card.IDENTITY]
    if not plan["coverage"]["whole"]:
        with atomic_write(job.folder / card.COVERAGE) as file:
            np.save(file, job.coverage)
        names.append(card.COVERAGE)
    files |= {name: sha256_file(job.folder / name) for name in names}
    identity = np.load(job.folder / card.IDENTITY, mmap_mode="r")
    test = evaluate(model, source.test, device=job.forward.device, views=source.views)
    found = {
        "train_top1": train_accuracy(identity, source.train.labels[job.coverage]),
        "test_top1": test["top1"],
        "features": int(np.load(job.folder / card.FEATURES, mmap_mode="r").shape[1]),
        "files": {name: {"sha256": sha, "bytes": (job.folder / name).stat().st_size} for name, sha in files.items()},
    }
    seconds = sum(float(record["seconds"]) for record in records)
    images = len(job.coverage) * job.n_views
    card.write_sealed(job.folder / card.TIMING, {"seconds": seconds, "images": images, "torch": torch.__version__})
    card.write_sealed(job.folder / card.MANIFEST, plan | found)
    return seconds


def _join(job: Job, kind: str, name: str) -> None:
    """Write the shards' parts one after another as one array, without holding more than one in memory."""
    width = np.load(job.part(kind, 0), mmap_mode="r").shape[1]
    header = {"descr": "<f4", "fortran_order": False, "shape": (len(job.coverage), width)}
    with atomic_write(job.folder / name) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for shard in range(job.count):
            file.write(np.load(job.part(kind, shard)).data)
