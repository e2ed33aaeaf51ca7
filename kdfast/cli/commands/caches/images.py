"""`kdfast cache`: store a teacher's logits on every view of every sample; verify a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from kdfast.cli import options
from kdfast.cli.command import Command, Group
from kdfast.cli.commands import recipe
from kdfast.cli.output import show
from kdfast.cli.progress import announce, format_seconds, progress
from kdfast.errors import UsageError

app = typer.Typer(invoke_without_command=True, cls=Group)


@app.callback()
def build(
    context: typer.Context,
    data: Annotated[
        str | None, typer.Option("--data", help="Source of data, as for `kdfast distill`.", metavar="PATH")
    ] = None,
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
        int, typer.Option("--views", help="Views per sample; 0: all views, for any later run.", min=0)
    ] = 0,
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
            "--temperature; for very many classes. Default: store all classes.",
            min=1,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature", help="With --top-k: temperature of the runs that will use the cache; default: 4."
        ),
    ] = None,
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
    from kdfast.estimates import cached_bytes, estimate_forward
    from kdfast.nets.checkpoint import load_model
    from kdfast.nets.fit import check_fit
    from kdfast.teacher.build import build_cache, check_build
    from kdfast.teacher.cache import TeacherCache
    from kdfast.teacher.plan import delete_cache, is_finished
    from kdfast.teacher.row_format import RowFormat, TopK

    options.one_of("--dtype", dtype, ("float16", "float32"))
    if subset is not None:
        check_subset_file(subset)
    model = load_model(teacher)
    source, views = augment_source(open_source(data, size=size, order=order, split=split), augment, views)
    check_fit(model, source, str(teacher))
    ids = None if subset is None else open_subset(subset, source).ids
    kept = len(source.train) if ids is None else len(ids)
    n_views = views or source.view_spec.count
    if top_k is None and temperature is not None:
        raise UsageError(
            "--temperature is given without --top-k: omit it, a cache of all classes serves any temperature"
        )
    kept_classes = None if top_k is None else TopK(top_k, 4.0 if temperature is None else temperature)
    place = resolve_device(device)
    arithmetic = options.CACHE_PRECISIONS[options.choose_precision(precision, place)]
    check_build(source, model, out, n_views, dtype, arithmetic, kept_classes)
    view_bytes = n_views * RowFormat(model.classes, np.dtype(dtype), kept_classes).row_bytes
    size_bytes = cached_bytes(model, source, samples=kept, view_bytes=view_bytes)
    reused = is_finished(out) and not force
    seconds = None if reused else estimate_forward(source, model, place, kept * n_views)
    announce(out, size_bytes, seconds)
    if dry_run:
        show(
            f"would run {model.name} on {kept} samples x {n_views} views = {kept * n_views} images "
            f"and write {size_bytes / 1e6:.0f} MB to {out}"
            f"{'' if seconds is None else f', in about {format_seconds(seconds)}'}",
            {"dry_run": True, "samples": kept, "views": n_views, "bytes": size_bytes, "seconds": seconds},
        )
        return
    if force:
        delete_cache(out)
    if not reused:
        recipe.announce_views(source, augment)
    with progress("cache") as report:
        build_cache(
            source,
            model,
            out,
            ids=ids,
            n_views=n_views,
            view_seed=view_seed,
            dtype=cast(Any, dtype),
            top_k=kept_classes,
            precision=cast(Any, arithmetic),
            batch_size=batch_size,
            device=place,
            progress=report,
        )
    manifest = TeacherCache.open(out, source=source, teacher=model, check_files=False).manifest
    numbers = {name: manifest[name] for name in ("seconds", "train_top1", "test_top1")}
    show(
        f"cached {kept} samples x {n_views} views x {top_k or model.classes} classes in {manifest['seconds']:.0f} s; "
        f"teacher's top-1: {numbers['train_top1']:.2f} on these samples, {numbers['test_top1']:.2f} on the test split",
        {"samples": kept, "views": n_views, "classes": top_k or model.classes, **numbers, "out": str(out)},
    )


@app.command("import", cls=Command)
def import_outputs(
    logits: Annotated[
        Path,
        typer.Argument(
            help="Outputs of a network on the training split, .npy, .npz, .pt or .safetensors: (N, C), or (N, V, C) "
            "on V views.",
            metavar="LOGITS",
        ),
    ],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of the cache.")],
    features: Annotated[
        Path | None,
        typer.Option("--features", help="Inputs of the network's last layer, (N, D), for methods that need them."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="What LOGITS holds; default: logits, unless they look like probabilities.",
            metavar="logits|probabilities|log-probabilities",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="What the logits were divided by, also before a softmax.")
    ] = 1.0,
    view_seed: Annotated[int, typer.Option("--view-seed", help="Seed that chose the views.", min=0, max=2**63 - 1)] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the stored logits.", metavar="float16|float32")
    ] = "float16",
    key: Annotated[
        str | None, typer.Option("--key", help="Name of the logits in a file of several arrays.", metavar="KEY")
    ] = None,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Make a cache of logits that another program computed. Row i is training sample i, and column c its class c.

    On (N, C), students see the images without augmentation, as the network did.
    """
    from kdfast.data.readers.registry import open_source
    from kdfast.teacher.writing.outputs import teacher_outputs

    source = open_source(data, size=size, order=order, split=split)
    with progress("cache") as report:
        cache = teacher_outputs(
            logits,
            source,
            out,
            features=features,
            kind=cast(Any, kind),
            temperature=temperature,
            view_seed=view_seed,
            dtype=dtype,
            key=key,
            force=force,
            progress=report,
        )
    top1, width = cache.manifest["train_top1"], cache.manifest["features"]
    show(
        f"imported {len(cache)} samples x {cache.n_views} views x {cache.classes} classes"
        f"{f' and {width} features' if width else ', without features'}; top-1: {top1:.2f} on these samples"
        f"{'; students will see the images without augmentation' if cache.n_views == 1 else ''}",
        {
            "samples": len(cache),
            "views": cache.n_views,
            "classes": cache.classes,
            "features": width,
            "train_top1": top1,
            "out": str(out),
        },
    )


@app.command("verify", cls=Command)
def verify(
    cache: Annotated[Path, typer.Option("--cache", help="Folder of the cache.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Source of data, as for `kdfast distill`.", metavar="PATH")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", help="Teacher that the cache was made with, T.pt; imported logits have none."),
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", help="Random entries to compute again and compare.", min=1)
    ] = 256,
    teacher_net: options.TeacherNet = None,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    config: options.Config = None,
) -> None:
    """Check every file of a cache against its manifest, and compare random entries with the teacher."""
    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import load_model
    from kdfast.teacher.cache import TeacherCache
    from kdfast.teacher.manifest import refuse_tokens
    from kdfast.teacher.verify import verify_cache

    refuse_tokens(cache)
    if data is None:
        raise UsageError("--data is required: see kdfast cache verify --help")
    source = open_source(data, size=size, order=order, split=split)
    model = None if teacher is None else load_model(teacher)
    opened = TeacherCache.open(cache, source=source, teacher=model, check_views=False)
    if model is None:
        if not opened.is_imported:
            raise UsageError(f"--teacher is not given, and {cache} was made with a teacher: pass it")
        show(
            f"{cache} is whole; its logits were imported, so there is no teacher to compute them again",
            {"cache": str(cache), "imported": True},
        )
        return
    found = verify_cache(opened, source, model, samples=samples, seed=seed, device=resolve_device(device))
    show(
        f"{cache} is whole; {found.rows} entries computed again differ by at most {found.largest_difference:.2g} "
        f"(allowed: {found.allowed:.2g}); {found.agreement:.1f}% have the same arg-max",
        {
            "cache": str(cache),
            "entries": found.rows,
            "largest_difference": found.largest_difference,
            "allowed": found.allowed,
            "agreement": found.agreement,
        },
    )
