"""`kdfast cache`: store a teacher's logits, or features, on the views of the samples."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kdfast.cli import options
from kdfast.cli.command import Group
from kdfast.cli.commands import recipe
from kdfast.cli.output import show
from kdfast.cli.progress import announce, format_seconds, list_files, progress
from kdfast.errors import UsageError

if TYPE_CHECKING:
    from kdfast.data.source import Source
    from kdfast.distributed.group import Distributed
    from kdfast.estimates import CacheSize
    from kdfast.nets.checkpoint import Model
    from kdfast.teacher.build import CacheBuild
    from kdfast.teacher.row_format import TopK

app = typer.Typer(invoke_without_command=True, cls=Group)


@app.callback()
def build(
    context: typer.Context,
    data: options.OptionalData = None,
    teacher: Annotated[Path | None, typer.Option("--teacher", help="Teacher, T.pt.")] = None,
    teacher_net: options.TeacherNet = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the cache; the same command resumes it.")] = None,
    subset: Annotated[
        str | None,
        typer.Option(
            "--subset",
            help="Subset file, idx.npy: cache only these samples; default: the whole training split.",
            metavar=options.PATH,
        ),
    ] = None,
    views: Annotated[
        int | None,
        typer.Option(
            "--views",
            help="Views per sample; 0: all views, for any later run. Default: all; 50 of large images.",
            min=0,
        ),
    ] = None,
    view_seed: Annotated[
        int, typer.Option("--view-seed", help="Seed that chooses the views.", min=0, max=2**63 - 1)
    ] = 0,
    augment: recipe.Augment = None,
    dtype: Annotated[
        str,
        typer.Option(
            "--dtype", help="Type of the stored logits; float32 takes twice the space.", metavar="float16|float32"
        ),
    ] = "float16",
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            help="Store only the K most probable classes of each view, and the probability of the others at "
            "--temperature; 0: all classes. Default: all; 10 of large images with more than 21 classes.",
            min=0,
        ),
    ] = None,
    temperature: Annotated[
        str | None,
        typer.Option(
            "--temperature",
            help="With --top-k: temperatures of the runs that will use the cache, comma-separated; default: 4.",
            metavar="LIST",
        ),
    ] = None,
    kind: Annotated[
        str,
        typer.Option(
            "--kind",
            help="What to store of each view: logits, or features, the inputs of the teacher's last linear layer, from "
            "which all logits are computed later, at any temperature; smaller if there are more classes than features.",
            metavar="logits|features",
        ),
    ] = "logits",
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="Arithmetic of the teacher. bf16 is faster on GPUs and CPUs with matrix units; its error far exceeds "
            "that of float16 storage. auto: bf16 where the device has instructions for it, else fp32.",
            metavar="auto|fp32|bf16",
            callback=options.parse_cache_precision,
        ),
    ] = "fp32",
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Images per forward pass; default: chosen for the device.", min=1),
    ] = None,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    device: options.Device = "auto",
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            help="Compute only part I of N, counted from 0, as one of N jobs: all in one folder, which is whole once "
            "the last is done, or each in a folder of its own for kdfast cache merge.",
            metavar="I/N",
        ),
    ] = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Cache a teacher's logits on the augmentation views of the training split, and its features.

    Each view is normalized as the teacher was trained. One cache of the whole split serves any later subset.
    """
    if context.invoked_subcommand is not None:
        return
    if data is None or teacher is None or out is None:
        raise UsageError("--data, --teacher and --out are required: see kdfast cache --help")
    import numpy as np

    from kdfast.data.augment.presets import augment_source
    from kdfast.data.readers.registry import open_source
    from kdfast.data.subset import check_subset_file, open_subset
    from kdfast.device import resolve_device
    from kdfast.distributed.group import Distributed
    from kdfast.estimates import estimate_cache, measure_cache
    from kdfast.nets.checkpoint import load_model
    from kdfast.nets.fit import check_fit
    from kdfast.teacher.build import build_cache, check_build, row_format
    from kdfast.teacher.cache import TeacherCache
    from kdfast.teacher.plan import default_views, delete_cache, is_finished

    options.one_of("--dtype", dtype, ("float16", "float32"))
    options.one_of("--kind", kind, ("logits", "features"))
    if subset is not None:
        check_subset_file(subset)
    model = load_model(teacher)
    source, asked = augment_source(open_source(data, size=size, order=order, split=split), augment, views or 0)
    check_fit(model, source, str(teacher))
    ids = np.arange(len(source.train)) if subset is None else np.sort(open_subset(subset, source).ids)
    kept = len(ids)
    n_views = asked or (default_views(source.view_spec) if views is None else source.view_spec.count)
    kept_classes = _choose_classes(source, model, top_k, temperature, kind)
    distributed = Distributed.from_environment()
    rank, world = _parse_shard(shard, distributed, force)
    place = distributed.local_device(resolve_device(device))
    arithmetic = options.CACHE_PRECISIONS[options.choose_precision(precision, place)]
    check_build(source, model, out, n_views, dtype, arithmetic, kept_classes, rank, world, kind=kind)
    rows = row_format(model, dtype, kept_classes, kind)
    bytes_ = measure_cache(model, source, samples=kept, n_views=n_views, rows=rows)
    reused = is_finished(out) and not force
    seconds = None if reused or not distributed.is_main else estimate_cache(
        source, model, place, ids=ids[: -(-kept // world)], n_views=n_views, rows=rows, precision=cast(Any, arithmetic),
        batch_size=batch_size,
    )  # fmt: skip
    announce(out, bytes_.total, seconds, files=bytes_.files, temporary=bytes_.temporary)
    if dry_run:
        _show_planned(model.name, kept, n_views, bytes_, seconds, out)
        return
    if not reused:
        recipe.announce_views(source, augment)
    with progress("cache") as report, distributed.process_group(None):
        if force and distributed.is_main:
            delete_cache(out)
        distributed.barrier()
        built = build_cache(
            source,
            model,
            out,
            ids=None if subset is None else ids,
            n_views=n_views,
            view_seed=view_seed,
            dtype=cast(Any, dtype),
            top_k=kept_classes,
            kind=cast(Any, kind),
            precision=cast(Any, arithmetic),
            batch_size=batch_size,
            device=place,
            rank=rank,
            world=world,
            part=shard is not None,
            progress=report,
        )
        distributed.barrier()  # the last one to finish has written the manifest
    if shard is not None and not built.complete:
        _show_part(built, shard)
    elif distributed.is_main:
        manifest = TeacherCache.open(out, source=source, teacher=model, check_files=False).manifest
        _show_cache(manifest, kept, n_views, model.classes if kept_classes is None else kept_classes.k, out)


def _show_planned(net: str, samples: int, views: int, planned: CacheSize, seconds: float | None, out: Path) -> None:
    from kdfast.files.space import format_bytes, free_space

    free = free_space(out)
    show(
        f"would run {net} on {samples} samples x {views} views = {samples * views} images "
        f"and write {format_bytes(planned.total)} to {out} ({list_files(planned.files)}; until it is finished, "
        f"{format_bytes(planned.temporary)} more; {format_bytes(free)} free)"
        f"{'' if seconds is None else f', in about {format_seconds(seconds)}'}",
        {"dry_run": True, "samples": samples, "views": views, "bytes": planned.total, "files": planned.files,
         "temporary_bytes": planned.temporary, "free_bytes": free, "seconds": seconds},
    )  # fmt: skip


def _show_cache(manifest: dict[str, Any], samples: int, views: int, classes: int, out: Path) -> None:
    numbers = {name: manifest[name] for name in ("seconds", "train_top1", "test_top1")}
    show(
        f"cached {samples} samples x {views} views x {classes} classes in {manifest['seconds']:.0f} s; "
        f"teacher's top-1: {numbers['train_top1']:.2f} on these samples, {numbers['test_top1']:.2f} on the test split",
        {"samples": samples, "views": views, "classes": classes, **numbers, "out": str(out)},
    )


def _parse_shard(shard: str | None, distributed: Distributed, force: bool) -> tuple[int, int]:
    """Return the part of this process and the number of parts: those of --shard, or of the processes."""
    if shard is None:
        return distributed.rank, distributed.world_size
    if distributed.world_size > 1:
        raise UsageError(
            f"--shard is for jobs of one process, and torchrun started {distributed.world_size}: omit one of both"
        )
    if force:
        raise UsageError("--force would delete the parts of other jobs: omit it, or delete the folder")
    rank, _, world = shard.partition("/")
    if not (rank.isdecimal() and world.isdecimal() and int(rank) < int(world)):
        raise UsageError(f"--shard is {shard!r}: pass I/N, with I from 0 to N - 1")
    return int(rank), int(world)


def _show_part(built: CacheBuild, shard: str) -> None:
    show(
        f"part {shard} is done: {built.computed} shards computed, {built.kept} kept. The cache in {built.path} is "
        "whole once the other parts are done in the same folder; kdfast cache merge joins those of several folders",
        {"shard": shard, "computed": built.computed, "kept": built.kept, "complete": False, "out": str(built.path)},
    )


def _choose_classes(source: Source, model: Model, top_k: int | None, temperature: str | None, kind: str) -> TopK | None:
    """Return the classes to store of each view; None: all."""
    from kdfast.teacher.plan import DEFAULT_TEMPERATURE, default_top_k
    from kdfast.teacher.row_format import TopK

    if top_k is None:
        top_k = default_top_k(source.view_spec, model.classes) if kind == "logits" else 0
    if not top_k:
        if temperature is not None:
            raise UsageError(
                "--temperature is given without --top-k: omit it, a cache of all classes serves any temperature"
            )
        return None
    try:
        given = [DEFAULT_TEMPERATURE] if temperature is None else [float(word) for word in temperature.split(",")]
        return TopK(top_k, given)
    except ValueError as error:
        raise UsageError(f"--temperature is {temperature!r}: pass numbers separated by commas") from error
