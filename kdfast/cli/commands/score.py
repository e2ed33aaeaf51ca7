"""`kdfast score`: compute one number per training sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.command import leave_to_main_process
from kdfast.cli.output import show
from kdfast.cli.progress import progress

Cache = Annotated[Path | None, typer.Option("--cache", help="Teacher's cache, for its logits and features.")]
Dynamics = Annotated[Path | None, typer.Option("--dynamics", help="Folder written by `kdfast dynamics`.")]


def score(
    data: options.Data,
    method: Annotated[str, typer.Option("--method", help="Score to compute; the list is below.", metavar="NAME")],
    out: Annotated[Path, typer.Option("--out", help="Score file to write, .npz.")],
    cache: Cache = None,
    dynamics: Dynamics = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Network, T.pt; influence-fvm and grand with network=full need it.")
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Option of the score; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    help_options: Annotated[
        bool,
        typer.Option(
            "--help-options", help="Print every option of --method and exit; without --method, of all scores."
        ),
    ] = False,
    teacher_net: options.TeacherNet = None,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    force: options.Force = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Score every training sample from a teacher's cache or recorded dynamics; a higher score means harder."""
    import numpy as np

    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.distributed.group import Distributed
    from kdfast.pruning.options import complete_options, parse_options
    from kdfast.pruning.score_file import check_score_path, read_origin, write_scores
    from kdfast.pruning.scores.compute import ScoreSources
    from kdfast.pruning.scores.registry import get_score

    check_score_path(out)
    score_options = complete_options(method, get_score(method).options, parse_options(option or []))
    distributed = Distributed.from_environment()
    if not get_score(method).is_shared(score_options):
        leave_to_main_process(f"score --method {method}")
        distributed = Distributed()
    place = distributed.local_device(resolve_device(device))
    source = open_source(data, size=size, order=order, split=split)
    sources = ScoreSources.open(source, cache=cache, dynamics=dynamics, teacher=teacher)
    if dry_run:
        show(
            f"would score {len(source.train)} samples by {method} from {', '.join(sources.digests) or 'the labels'}",
            {"dry_run": True, "samples": len(source.train), "method": method, "sources": dict(sources.digests)},
        )
        return
    held = read_origin(out)
    if held is not None:  # what can be told before the work
        options.refuse_other(out, (held["method"], held["data"]) == (method, source.fingerprint), force)
    with progress(method) as report, distributed.process_group(place):
        content = sources.score(
            method, seed=seed, options=score_options, device=str(place), progress=report, distributed=distributed
        )
    if not distributed.is_main:
        return
    if held is not None:
        options.refuse_other(out, held == content.origin, force)
    write_scores(out, content)
    low, high = content.scores.min(), content.scores.max()
    facts = {"samples": len(content.scores), "method": method, "seconds": content.seconds, "out": str(out)}
    facts |= {"least": float(low), "most": float(high)}
    text = (
        f"scored {len(content.scores)} samples by {method} in {content.seconds:.2f} s, from {low:.4g} to {high:.4g}; "
        f"written to {out}"
    )
    if "stderr" in content.extras:
        median = facts["median_stderr"] = float(np.median(content.extras["stderr"]))
        text += f"\nthe median standard error of a score is {median:.2g}; four times as many runs halve it"
    show(text, facts)
