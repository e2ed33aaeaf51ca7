"""`kdfast cache`: record what a teacher says about every view of every sample; verify such a record."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    batch_size: Annotated[int, typer.Option("--batch-size", help="Images a forward pass.", min=1)] = 500,
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
    from kdfast.data.sources import open_source
    from kdfast.data.subset import read_subset
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import load_model
    from kdfast.teacher.cache import build_cache

    source = open_source(data, size=size)
    model = load_model(teacher)
    ids = None if subset is None else read_subset(subset, n=len(source.train), fingerprint=source.fingerprint).ids
    kept = len(source.train) if ids is None else len(ids)
    n_views = views or source.views.count
    width = {"float16": 2, "float32": 4}.get(dtype, 0)
    if dry_run:
        print(
            f"would run {model.name} on {kept} samples x {n_views} views = {kept * n_views} images "
            f"and write {kept * n_views * model.classes * width / 1e6:.0f} MB of logits to {out}"
        )
        return
    with progress("cache") as report:
        cache = build_cache(
            source,
            model,
            out,
            ids=ids,
            n_views=n_views,
            view_seed=view_seed,
            dtype=dtype,
            batch_size=batch_size,
            device=resolve_device(device),
            progress=report,
        )
    manifest = cache.manifest
    print(
        f"cached {kept} samples x {n_views} views x {model.classes} classes in {manifest['seconds']:.0f} s; "
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
    from kdfast.data.sources import open_source
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import load_model
    from kdfast.teacher.cache import TeacherCache

    source = open_source(data, size=size)
    model = load_model(teacher)
    opened = TeacherCache.open(cache, fingerprint=source.fingerprint, teacher=model, views=source.views)
    error = opened.verify(source, model, samples=samples, seed=seed, device=resolve_device(device))
    print(f"{cache} is whole; {samples} entries computed again differ by at most {error:.2g}")
