"""`kdfast score`: one number a training sample."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options

Cache = Annotated[Path | None, typer.Option("--cache", help="A teacher's cache, for its logits and features.")]
Dynamics = Annotated[Path | None, typer.Option("--dynamics", help="A folder written by `kdfast dynamics`.")]
Option = Annotated[
    list[str] | None, typer.Option("--option", help="An option of the method as name=value; may come several times.")
]


def score(
    data: options.Data,
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="random, forgetting, grand, el2n, memorization, moderate, d2, dual, ccs, aum or influence.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="scores.npz: scores, extras, method, parameters, fingerprints.")],
    cache: Cache = None,
    dynamics: Dynamics = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="A network, T.pt, for grand with network=full.")
    ] = None,
    option: Option = None,
    size: options.Size = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Score every training sample, from a teacher's cache or from recorded dynamics; higher is harder."""
    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.prune.score_file import check_score_path, write_scores
    from kdfast.prune.scores.compute import compute, open_inputs, parse_options
    from kdfast.prune.scores.registry import method_named

    check_score_path(out)
    given = method_named(method).complete(parse_options(option or []))
    place = str(resolve_device(device))
    source = open_source(data, size=size)
    inputs, digests = open_inputs(
        source, seed=seed, cache=cache, dynamics=dynamics, teacher=teacher, options=given, device=place
    )
    if dry_run:
        print(f"would score {len(source.train)} samples by {method} from {', '.join(digests) or 'the labels'}")
        return
    content = compute(method, inputs, digests, source.fingerprint)
    write_scores(out, content)
    low, high = content.scores.min(), content.scores.max()
    print(
        f"scored {len(content.scores)} samples by {method} in {content.seconds:.2f} s, from {low:.4g} to {high:.4g}; "
        f"written to {out}"
    )
