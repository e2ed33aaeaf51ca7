"""`kdfast cache verify`: check a cache's files, and compare random entries with the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.output import show
from kdfast.errors import UsageError


def verify(
    cache: Annotated[Path, typer.Option("--cache", help="Folder of the cache.")],
    data: options.OptionalData = None,
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
