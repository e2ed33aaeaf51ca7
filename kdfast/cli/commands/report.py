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


@app.command("scores", cls=Command)
def scores(
    file: Annotated[
        Path, typer.Argument(help="Score file written by `kdfast score`, or scores of your own.", metavar="SCORES")
    ],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", help="Page to write, .html; it loads no other file.")],
    cache: Cache = None,
    subset: Annotated[
        list[Path] | None,
        typer.Option("--subset", help="Subset file whose class balance to show; repeatable.", metavar=options.PATH),
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
    classes: Annotated[int, typer.Option("--classes", help="Number of classes of which to show samples.", min=1)] = 5,
    each: Annotated[
        int, typer.Option("--each", help="Samples to show at either end of a class.", min=1, max=1000)
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
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Show histograms per class, extreme samples, class balance, overlap with other scores, and provenance."""
    from kdfast.data.readers.registry import open_source
    from kdfast.prune.own_scores import describe_scores
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
    )
    size_bytes = write_score_page(content, out, replace=force)
    for scored in (content.scored, *content.others.values()):
        if (how := describe_scores(scored.method, scored.parameters)) is not None:
            note(how)
    show(
        f"wrote {out}: {size_bytes / 1e6:.1f} MB, {len(content.scored.scores)} {content.scored.method} scores",
        {"out": str(out), "bytes": size_bytes, "scores": len(content.scored.scores), "method": content.scored.method},
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
