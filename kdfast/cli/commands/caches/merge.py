"""`kdfast cache merge`: join the parts of a cache that jobs have written to folders of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.output import show
from kdfast.cli.progress import progress


def merge(
    parts: Annotated[
        list[Path], typer.Argument(help="Folders that kdfast cache --shard has written.", metavar="PART...")
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder of the cache; the same command resumes it.")],
    config: options.Config = None,
) -> None:
    """Join the parts of a cache that jobs have written to folders of their own, and compare every file's digest.

    The result has the bytes of a cache that one process has built. The parts stay.
    """
    from kdfast.teacher.cache import TeacherCache
    from kdfast.teacher.writing.parts import merge_parts

    with progress("merge") as report:
        merge_parts(parts, out, progress=report)
    cache = TeacherCache.open(out, check_files=False)
    facts = {"parts": len(parts), "samples": len(cache), "views": cache.n_views, "out": str(out)}
    show(
        f"merged {len(parts)} parts: {len(cache)} samples x {cache.n_views} views; teacher's top-1: "
        f"{cache.manifest['train_top1']:.2f} on these samples, {cache.manifest['test_top1']:.2f} on the test split",
        {**facts, **{name: cache.manifest[name] for name in ("train_top1", "test_top1")}},
    )
