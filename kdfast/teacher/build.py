"""Build a teacher's cache: first its plan, then its shards, and last its manifest.

Several processes can share a build. Process `rank` of `world` computes the shards rank, rank + world, rank + 2 world,
and so on. They communicate through the folder alone: each holds its own lock while it works, a shard counts as
done once its record exists, and the process that finds all shards done locks the folder and writes the manifest. The
`.building` subfolder holds all of this; it is removed once the manifest exists.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from kdfast.data.source import Source, check_epoch_ids
from kdfast.errors import CacheMismatch, DataError, Interrupted, OutputError, UsageError
from kdfast.files import FolderLock, check_writable, make_subfolder, sha256_json
from kdfast.nets.checkpoint import Model
from kdfast.nets.fit import check_class_names
from kdfast.nets.head import check_linear_head, find_classifier
from kdfast.progress import Progress
from kdfast.teacher.manifest import BUILDING, MANIFEST
from kdfast.teacher.plan import (
    SHARD_BYTES,
    check_cache_folder,
    describe_teacher,
    make_plan,
    samples_per_shard,
    write_or_check_plan,
)
from kdfast.teacher.predictor import Precision, Predictor, default_batch_size
from kdfast.teacher.row_format import RowFormat, TopK
from kdfast.teacher.writing.finish import reuse_finished, write_manifest
from kdfast.teacher.writing.parts import write_part
from kdfast.teacher.writing.shards import ShardBuilder

Dtype = Literal["float16", "float32"]
Kind = Literal["logits", "features"]


@dataclass(frozen=True)
class CacheBuild:
    """Outcome of a call of `build_cache`.

    Attributes:
        path: The cache's folder.
        complete: Whether the manifest exists; False while other ranks are still working.
        computed: Shards computed by this call.
        kept: Shards of this rank that already existed and passed verification.
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
    kind: Kind = "logits",
    precision: Precision = "float32",
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
    rank: int = 0,
    world: int = 1,
    part: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> CacheBuild:
    """Write a teacher's logits on views of the training samples, or resume writing them.

    The same call resumes an interrupted build: finished shards are verified and kept, and the result has the same bytes
    as that of an uninterrupted build. Several processes share the work when each passes its `rank` and the same
    `world`; the last one to finish writes the manifest.

    Args:
        source: The data.
        model: The teacher.
        out: The cache's folder; created if missing.
        ids: Original indices of the samples to cover, in any order; None for the whole training split.
        n_views: Views per sample, chosen by `view_table`; None for all views.
        view_seed: Seed of that choice.
        dtype: dtype of the stored logits or features. float16 has a relative error of at most 1 / 2048.
        top_k: Keep only the most probable classes of each view, for data with very many classes. The identity view's
            logits of all classes are stored in addition, because scores need them.
        kind: "features" stores the inputs of the network's last layer on each view, and the layer's weights once. The
            logits of all classes are computed from them when they are looked up: smaller than logits if there are more
            classes than features.
        precision: "bfloat16" computes views other than the identity in bfloat16, several times as fast on CPUs with
            matrix units and on GPUs, with an error far above float16's rounding. The identity view is always float32.
        device: Where to compute.
        batch_size: Images per forward pass; None for one that suits the device.
        rank: Index of this process, in [0, world).
        world: Number of processes.
        part: Whether the folder may be this process's own, for `kdfast.teacher.writing.parts.merge_parts`.
        shard_bytes: Approximate size of a shard's file of logits.
        progress: Called with (images done, images in total, note) as this process advances.

    Returns:
        The outcome.

    Raises:
        UsageError: An option is out of range.
        SubsetError: `ids` are not distinct indices of training samples.
        CacheMismatch: The folder holds another cache, finished or not, or a damaged one, or the teacher has another
            number of classes than the data.
        CheckpointError: The teacher has other classes than the data, or the same in another order.
        DataError: A logit is not finite, or too large for float16.
        OutputError: The folder cannot be written, holds something else, or another process is building in it.
        Interrupted: After Ctrl-C; the same call resumes.
    """
    place = torch.device(device)
    n_views = source.view_spec.count if n_views is None else n_views
    check_build(source, model, out, n_views, dtype, precision, top_k, rank, world, kind=kind)
    coverage = np.arange(len(source.train), dtype=np.int64)
    if ids is not None:
        coverage = np.sort(check_epoch_ids(ids, len(source.train), 1))
    batch_size = batch_size or default_batch_size(place)
    rows = row_format(model, dtype, top_k, kind)
    per_shard = samples_per_shard(n_views, rows.row_bytes, shard_bytes)
    plan = make_plan(source, describe_teacher(model), coverage, n_views, view_seed)
    plan |= {"dtype": dtype, "precision": precision, "batch_size": batch_size, "device": place.type}
    plan |= {"per_shard": per_shard, "top_k": None if top_k is None else top_k.to_dict()}
    if kind == "features":
        plan |= {"kind": kind, "features": rows.features}
    folder = check_writable(out)
    if (folder / MANIFEST).exists():
        return CacheBuild(folder, True, 0, 0, reuse_finished(folder, plan))
    builder = ShardBuilder(
        folder=folder,
        plan_digest=sha256_json(plan),
        split=source.train,
        predictor=Predictor(model, source.view_spec, place, batch_size),
        spec=source.view_spec,
        view_seed=view_seed,
        n_views=n_views,
        rows=rows,
        precision=precision,
        coverage=coverage,
        per_shard=per_shard,
    )
    return _build(builder, plan, source, model, rank, world, part, progress)


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
    *,
    kind: str = "logits",
) -> None:
    """Raise what `build_cache` would raise before any work, for the same arguments. Writes nothing.

    Raises:
        UsageError, CacheMismatch, CheckpointError, OutputError: As in `build_cache`.
    """
    if kind not in get_args(Kind):
        raise UsageError(f"`kind` is {kind!r}: pass one of {', '.join(get_args(Kind))}")
    if kind == "features":
        if top_k is not None:
            raise UsageError("`top_k` chooses among logits, and `kind` is features, which give all of them: omit one")
        check_linear_head(model.net, model.name, source.view_spec.size)
    if top_k is not None:
        top_k.check(model.classes)
    if dtype not in get_args(Dtype):
        raise UsageError(f"`dtype` is {dtype!r}: pass one of {', '.join(get_args(Dtype))}")
    if precision not in get_args(Precision):
        raise UsageError(f"`precision` is {precision!r}: pass one of {', '.join(get_args(Precision))}")
    if not 1 <= n_views <= source.view_spec.count:
        raise UsageError(f"{n_views} views per sample, but the data has {source.view_spec.count}: use 1 to that many")
    if not 0 <= rank < world:
        raise UsageError(f"`rank` is {rank} with `world` {world}: pass a rank from 0 to world - 1")
    if model.classes != len(source.classes):
        raise CacheMismatch(
            f"the teacher ({model.name}) has {model.classes} classes, the data {source.path} has "
            f"{len(source.classes)}: use a teacher trained on this data"
        )
    check_class_names(model, source)
    check_cache_folder(Path(out))


def row_format(model: Model, dtype: str, top_k: TopK | None = None, kind: str = "logits") -> RowFormat:
    """Return the format of the rows that `build_cache` writes with these arguments."""
    width = find_classifier(model.net).in_features if kind == "features" else 0
    return RowFormat(model.classes, np.dtype(dtype), top_k, features=width)


def _build(
    builder: ShardBuilder,
    plan: dict[str, Any],
    source: Source,
    model: Model,
    rank: int,
    world: int,
    part: bool,
    progress: Progress | None,
) -> CacheBuild:
    """Compute the shards of this rank, and finish the cache if they were the last ones."""
    folder = builder.folder
    rank_folder = make_subfolder(folder, BUILDING, f"rank-{rank}")
    write_or_check_plan(folder, plan)
    try:
        with FolderLock(rank_folder):
            computed, kept = _write_shards(builder, range(rank, builder.shard_count, world), progress)
            done = _finish(builder, plan, source, model, computed, kept, alone=world == 1)
            if part and not done.complete:
                done = _leave_part(builder, plan, source, model, rank, world, done)
            return done
    except DataError:
        if world == 1 and not any(builder.read_record(shard) for shard in range(builder.shard_count)):
            shutil.rmtree(folder / BUILDING)  # nothing to resume: the folder can be used with other options
        raise
    except KeyboardInterrupt as stop:
        raise Interrupted(
            f"interrupted; run the same command again to resume the cache in {folder} after its finished shards"
        ) from stop


def _write_shards(builder: ShardBuilder, shards: range, progress: Progress | None) -> tuple[int, int]:
    """Compute the shards that are not done yet; return the numbers of computed and of kept shards."""
    total = sum(len(builder.sample_ids(shard)) for shard in shards) * builder.n_views
    done = computed = kept = 0

    def advance(images: int) -> None:
        nonlocal done
        done += images
        if progress is not None:
            progress(done, total, f"shard {computed + kept + 1} of {len(shards)}")

    for shard in shards:
        if builder.is_done(shard):
            advance(len(builder.sample_ids(shard)) * builder.n_views)
            kept += 1
        else:
            builder.write(shard, advance)
            computed += 1
    return computed, kept


def _finish(
    builder: ShardBuilder,
    plan: dict[str, Any],
    source: Source,
    model: Model,
    computed: int,
    kept: int,
    *,
    alone: bool,
) -> CacheBuild:
    """Write the manifest if all shards are done and no other rank is writing it."""
    unfinished = CacheBuild(builder.folder, False, computed, kept, 0.0)
    if any(builder.read_record(shard) is None for shard in range(builder.shard_count)):
        # Records also vanish when another rank has just completed the cache.
        return _finished_by_another(builder.folder, plan, computed, kept) or unfinished
    try:
        with FolderLock(builder.folder / BUILDING):
            seconds = write_manifest(builder, plan, source, model)
    except OutputError:
        # Another rank holds the lock, or has completed the cache and removed the locked folder.
        if alone:
            raise
        return _finished_by_another(builder.folder, plan, computed, kept) or unfinished
    shutil.rmtree(builder.folder / BUILDING)
    return CacheBuild(builder.folder, True, computed, kept, seconds)


def _leave_part(
    builder: ShardBuilder,
    plan: dict[str, Any],
    source: Source,
    model: Model,
    rank: int,
    world: int,
    done: CacheBuild,
) -> CacheBuild:
    try:
        write_part(builder, plan, source, model, rank, world)
    except (OutputError, CacheMismatch):
        # Another rank has completed the cache in this folder and removed its unfinished parts.
        finished = _finished_by_another(builder.folder, plan, done.computed, done.kept)
        if finished is None:
            raise
        return finished
    return done


def _finished_by_another(folder: Path, plan: dict[str, Any], computed: int, kept: int) -> CacheBuild | None:
    if not (folder / MANIFEST).exists():
        return None
    return CacheBuild(folder, True, computed, kept, reuse_finished(folder, plan))
