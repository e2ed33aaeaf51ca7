"""`kdfast cache`: record what a teacher says about every view of every sample; verify such a record."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from kdfast.cli import options
from kdfast.cli.progress import progress
from kdfast.errors import UsageError

app = typer.Typer(help="Cache a teacher's logits and features; verify a cache.", invoke_without_command=True)


@app.callback()
def build(
    context: typer.Context,
    data: Annotated[str | None, typer.Option("--data", help="A source of data, as for `kdfast distill`.")] = None,
    teacher: Annotated[Path | None, typer.Option("--teacher", help="A kdfast model, T.pt.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="The cache's folder; the same command resumes it.")] = None,
    subset: Annotated[
        str | None, typer.Option("--subset", help="idx.npy: cache these samples only; such a cache serves no others.")
    ] = None,
    views: Annotated[
        int, typer.Option("--views", help="Views a sample; 0: all there are, which serves any later run.", min=0)
    ] = 0,
    view_seed: Annotated[int, typer.Option("--view-seed", help="Seed of the choice of views.", min=0)] = 0,
    dtype: Annotated[str, typer.Option("--dtype", help="float16, or float32 at twice the size.")] = "float16",
    top_k: Annotated[
        int | None,
        typer.Option(
            "--top-k",
            help="Keep the K most probable classes of each view, and what the others weigh at --temperature: for very "
            "many classes.",
            min=1,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="With --top-k: the temperature of the runs that it is for; by default 4."),
    ] = None,
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            help="float32; bfloat16 runs the teacher faster on CPUs with matrix units and on "
            "GPUs, with an error far above float16's rounding.",
        ),
    ] = "float32",
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", help="Images a forward pass; by default one that suits the device.", min=1),
    ] = None,
    size: options.Size = None,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Cache the raw logits of a teacher on the augmentation views of the training split, and its features.

    The teacher reads each view in its own normalisation. One cache of the whole split serves every later pruning.
    """
    if context.invoked_subcommand is not None:
        return
    if data is None or teacher is None or out is None:
        raise UsageError("kdfast cache needs --data, --teacher and --out; see kdfast cache --help")
    import numpy as np

    from kdfast.data.readers.registry import open_source
    from kdfast.data.subset import check_subset_file, read_subset
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import load_model
    from kdfast.teacher.build import build_cache, check_build
    from kdfast.teacher.cache import TeacherCache
    from kdfast.teacher.rows import Rows, TopK

    _one_of("--dtype", dtype, ("float16", "float32"))
    _one_of("--precision", precision, ("float32", "bfloat16"))
    if subset is not None:
        check_subset_file(subset)
    model = load_model(teacher)
    source = open_source(data, size=size)
    ids = None if subset is None else read_subset(subset, n=len(source.train), fingerprint=source.fingerprint).ids
    kept = len(source.train) if ids is None else len(ids)
    n_views = views or source.views.count
    if top_k is None and temperature is not None:
        raise UsageError("--temperature is for --top-k: a cache of all classes serves every temperature")
    kept_classes = None if top_k is None else TopK(top_k, 4.0 if temperature is None else temperature)
    place = resolve_device(device)
    if dry_run:
        check_build(source, model, out, n_views, dtype, precision, kept_classes)
        row_bytes = Rows(model.classes, np.dtype(dtype), kept_classes).row_bytes
        print(
            f"would run {model.name} on {kept} samples x {n_views} views = {kept * n_views} images "
            f"and write {kept * n_views * row_bytes / 1e6:.0f} MB of logits to {out}"
        )
        return
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
            precision=cast(Any, precision),
            batch_size=batch_size,
            device=place,
            progress=report,
        )
    manifest = TeacherCache.open(out, source=source, teacher=model, check_files=False).manifest
    print(
        f"cached {kept} samples x {n_views} views x {top_k or model.classes} classes in {manifest['seconds']:.0f} s; "
        f"teacher's top-1: {manifest['train_top1']:.2f} on these samples, {manifest['test_top1']:.2f} on the test split"
    )


@app.command("verify")
def verify(
    cache: Annotated[Path, typer.Option("--cache", help="The cache's folder.")],
    data: options.Data,
    teacher: Annotated[Path, typer.Option("--teacher", help="The teacher it was made by.")],
    samples: Annotated[int, typer.Option("--samples", help="How many random entries to compute again.", min=1)] = 256,
    size: options.Size = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    config: options.Config = None,
) -> None:
    """Check every file of a cache against its manifest, and compute random entries again."""
    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import load_model
    from kdfast.teacher.cache import TeacherCache

    source = open_source(data, size=size)
    model = load_model(teacher)
    opened = TeacherCache.open(cache, source=source, teacher=model)
    found = opened.verify(source, model, samples=samples, seed=seed, device=resolve_device(device))
    print(
        f"{cache} is whole; {found.rows} entries computed again differ by at most {found.largest_difference:.2g} "
        f"(allowed: {found.allowed:.2g}); {found.agreement:.1f}% have the same arg-max"
    )


def _one_of(flag: str, value: str, allowed: Iterable[str]) -> None:
    if value not in allowed:
        raise UsageError(f"{flag} is {value!r}; needed: {' or '.join(allowed)}")
