"""`kdfast teacher average`: average the weights of teachers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.commands import training
from kdfast.cli.output import show
from kdfast.cli.progress import progress


def average(
    teachers: Annotated[
        list[Path],
        typer.Argument(
            help="Teachers of one architecture that started from the same weights; of one alone, only the statistics "
            "of batch norms are computed anew.",
            metavar="T.pt",
        ),
    ],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", help="Model file to write, T.pt.")],
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Average the weights of teachers, compute the statistics of batch norms anew, and evaluate on the test split.

    The average of the ends of several warm restarts (`kdfast teacher train --init`) often classifies better than each.
    """
    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.nets.average import average_teachers
    from kdfast.nets.checkpoint import load_model, save_model
    from kdfast.teacher.evaluate import evaluate

    training.refuse_existing(out, force=force)
    place = resolve_device(device)
    models = [load_model(path) for path in teachers]
    source = open_source(data, size=size, order=order, split=split)
    with progress("average") as report:
        model = average_teachers(models, source, seed=seed, device=place, progress=report)
    scores = evaluate(model, source.test, device=place, view_spec=source.view_spec)
    model.metadata.update({"test_top1": scores["top1"], "test_top5": scores["top5"]})
    save_model(out, model)
    show(
        f"test top-1 {scores['top1']:.2f}  top-5 {scores['top5']:.2f}; average of {len(models)}, written to {out}",
        {"net": model.name, **scores, "teachers": len(models), "out": str(out)},
    )
