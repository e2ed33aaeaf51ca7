"""`kdfast prune`: choose the samples to keep."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdfast.cli import options
from kdfast.cli.progress import progress
from kdfast.cli.score import Cache, Dynamics
from kdfast.errors import UsageError

if TYPE_CHECKING:
    from kdfast.prune.select import Selection


def prune(
    data: options.Data,
    fraction: Annotated[
        list[float],
        typer.Option("--fraction", help="Share of the training split to keep, in (0, 1]; may come several times."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            help="idx.npy: int64 indices; its provenance goes beside it, idx.json. For several fractions: "
            "idx-{fraction}.npy.",
        ),
    ],
    scores: Annotated[Path | None, typer.Option("--scores", help="A file written by `kdfast score`.")] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            help="Instead: score now, by a method of `kdfast score`; or if-beta, which needs no rule. "
            "Without both: random.",
        ),
    ] = None,
    cache: Cache = None,
    dynamics: Dynamics = None,
    rule: Annotated[
        str | None,
        typer.Option(
            "--rule",
            help="How scores choose: hard, easy, moderate, random, strata, beta, d2 or dual. By default the rule that "
            "was published with the method.",
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="An option of the rule, or of if-beta, as name=value; may come several times."),
    ] = None,
    score_option: Annotated[
        list[str] | None, typer.Option("--score-option", help="Likewise, an option of the method.")
    ] = None,
    balanced: Annotated[
        bool,
        typer.Option("--balanced/--unbalanced", help="Keep the classes' proportions, or rank all samples together."),
    ] = True,
    equal: Annotated[bool, typer.Option("--equal", help="Keep the same number of every class.")] = False,
    size: options.Size = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Write subset files: the indices of the training samples to keep.

    Any one-dimensional int64 array saved with np.save is a subset file too.
    """
    import numpy as np

    from kdfast.data.readers.registry import open_source
    from kdfast.data.subset import check_subset_path
    from kdfast.device import resolve_device
    from kdfast.files import check_writable
    from kdfast.prune.scores.compute import parse_options
    from kdfast.prune.select import Request, out_paths
    from kdfast.prune.selectors import CHOOSERS

    if equal and not balanced:
        raise UsageError("--equal and --unbalanced exclude each other; give one of them")
    paths = out_paths(out, fraction)
    for path in paths:
        check_subset_path(path)
    request = Request(
        fractions=tuple(fraction),
        balance="equal" if equal else "balanced" if balanced else "unbalanced",
        seed=seed,
        device=str(resolve_device(device)),
        cache=cache,
        dynamics=dynamics,
        rule=rule,
        options=parse_options(option or []),
        score_options=parse_options(score_option or []),
    )
    if method in CHOOSERS:
        if scores is not None:
            raise UsageError(f"--scores and --method {method} exclude each other: it needs no scores")
        states = [None if dry_run else path.with_suffix(".search.json") for path in paths]
        source = open_source(data, size=size)
        if not dry_run:
            for folder in {path.parent for path in paths}:
                check_writable(folder)
        with progress(method) as report:
            selections = []
            for path, selection in zip(paths, request.choose_by(method, source, states, report), strict=True):
                selections.append(selection)
                if not dry_run:
                    _write(path, selection)
    else:
        request.check(scores, method)
        selections = request.choose_from(scores, method, source := open_source(data, size=size))
        if not dry_run:
            for path, selection in zip(paths, selections, strict=True):
                _write(path, selection)
    for selection in selections:
        counts = np.bincount(source.train.labels[selection.ids], minlength=len(source.classes))
        print(
            f"{'would keep' if dry_run else 'kept'} {len(selection.ids)} of {len(source.train)} training samples "
            f"({selection}); {counts.min()} to {counts.max()} a class"
        )


def _write(path: Path, selection: Selection) -> None:
    from kdfast.data.subset import write_subset

    write_subset(path, selection.ids, selection.provenance)
    path.with_suffix(".search.json").unlink(missing_ok=True)
