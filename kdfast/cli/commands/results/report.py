"""`kdfast report`: self-contained HTML pages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.command import Command
from kdfast.cli.commands.score import Cache
from kdfast.cli.output import note, show

app = typer.Typer(help="Write self-contained HTML pages about scores and selections.", no_args_is_help=True)


Out = Annotated[Path, typer.Option("--out", help="Page to write, .html; it loads no other file.")]
Classes = Annotated[int, typer.Option("--classes", help="Number of classes of which to show samples.", min=1)]
Seed = Annotated[
    int, typer.Option("--seed", help="Seed of the kept and dropped samples to show.", min=0, max=2**63 - 1)
]


@app.command("scores", cls=Command)
def scores(
    file: Annotated[
        Path, typer.Argument(help="Score file written by `kdfast score`, or scores of your own.", metavar="SCORES")
    ],
    data: options.Data,
    out: Out,
    cache: Cache = None,
    subset: Annotated[
        list[Path] | None,
        typer.Option(
            "--subset",
            help="Subset file whose samples to mark in the histograms, with its class balance and samples that it "
            "drops; repeatable.",
            metavar=options.PATH,
        ),
    ] = None,
    others: Annotated[
        list[Path] | None,
        typer.Option("--scores", help="Score file of the same data to compare with; repeatable.", metavar=options.PATH),
    ] = None,
    key: Annotated[
        list[str] | None,
        typer.Option("--key", help=f"{options.KEY_HELP}; once, or once for each file, SCORES first.", metavar="KEY"),
    ] = None,
    higher: Annotated[
        list[str] | None,
        typer.Option(
            "--higher",
            help=f"{options.HIGHER_HELP}; once, or once for each file, SCORES first.",
            metavar=options.HIGHER,
        ),
    ] = None,
    classes: Classes = 5,
    each: Annotated[
        int,
        typer.Option(
            "--each",
            help="Samples to show at either end of a class, and of those kept and dropped.",
            min=1,
            max=1000,
        ),
    ] = 10,
    fraction: Annotated[
        float,
        typer.Option(
            "--fraction",
            help="Share of the highest scores whose overlap to compare, above 0 and at most 1.",
            min=1e-6,
            max=1,
        ),
    ] = 0.1,
    seed: Seed = 0,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Show histograms per class, extreme samples, kept and dropped samples, class balance, overlap, and provenance."""
    from kdfast.data.readers.registry import open_source
    from kdfast.pruning.own_scores import describe_scores
    from kdfast.report.page import check_page_path
    from kdfast.report.score_data import read_score_page_data
    from kdfast.report.score_page import write_score_page

    check_page_path(out)
    content = read_score_page_data(
        open_source(data, size=size, order=order, split=split),
        file,
        others=others or [],
        key=key or [],
        higher=higher or [],
        subsets=subset or [],
        cache=cache,
        sample_classes=classes,
        samples_per_end=each,
        fraction=fraction,
        seed=seed,
    )
    size_bytes = write_score_page(content, out, replace=force)
    scored, *_ = score_files = list(content.score_files.values())
    for one in score_files:
        if (how := describe_scores(one.method, one.parameters)) is not None:
            note(how)
    show(
        f"wrote {out}: {size_bytes / 1e6:.1f} MB, {len(scored.scores)} {scored.method} scores",
        {"out": str(out), "bytes": size_bytes, "scores": len(scored.scores), "method": scored.method},
    )


@app.command("subsets", cls=Command)
def subsets(
    files: Annotated[
        list[Path], typer.Argument(help="Subset files, of `kdfast prune` or of your own.", metavar="SUBSET...")
    ],
    data: options.Data,
    out: Out,
    cache: Cache = None,
    classes: Classes = 5,
    each: Annotated[
        int,
        typer.Option("--each", help="Kept and dropped samples to show of each class.", min=1, max=1000),
    ] = 10,
    seed: Seed = 0,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Show subsets without scores: kept and dropped samples, class balance, overlap, and provenance."""
    from kdfast.data.readers.registry import open_source
    from kdfast.report.page import check_page_path
    from kdfast.report.score_data import read_score_page_data
    from kdfast.report.score_page import write_score_page

    check_page_path(out)
    content = read_score_page_data(
        open_source(data, size=size, order=order, split=split),
        None,
        subsets=files,
        cache=cache,
        sample_classes=classes,
        samples_per_end=each,
        seed=seed,
    )
    size_bytes = write_score_page(content, out, replace=force)
    kept = {name: len(subset.ids) for name, subset in content.subsets.items()}
    counts = ", ".join(f"{name} keeps {count:,}" for name, count in kept.items())
    show(
        f"wrote {out}: {size_bytes / 1e6:.1f} MB, {counts} of {len(content.source.train):,} samples",
        {"out": str(out), "bytes": size_bytes, "kept": kept},
    )


@app.command("if-beta", cls=Command)
def if_beta(
    file: Annotated[
        Path,
        typer.Argument(
            help="idx.json, written beside a subset by `kdfast prune --method if-beta`.", metavar="IDX_JSON"
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Page to write, .html; it loads no other file.")],
    force: options.Force = False,
) -> None:
    """Show a learned sampling policy: density over the ranks, path of (a, b), rewards, subset and cost."""
    from kdfast.report.if_beta_page import write_if_beta_page

    size_bytes = write_if_beta_page(file, out, replace=force)
    show(f"wrote {out}: {size_bytes / 1e3:.0f} kB", {"out": str(out), "bytes": size_bytes})
