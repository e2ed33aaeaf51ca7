"""`kdfast eval`: evaluate a model on the test split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.output import say


def evaluate(
    data: options.Data,
    model: Annotated[Path, typer.Option("--model", help="Model, T.pt or the student.pt of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a line of text.")] = False,
    size: options.Size = None,
    order: options.Order = "path",
    device: options.Device = "auto",
    config: options.Config = None,
) -> None:
    """Print a model's top-1 and top-5 accuracy and its loss on the test split, in percent and nats."""
    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import load_model
    from kdfast.nets.fit import check_fit
    from kdfast.teacher.evaluate import evaluate as evaluate_model

    source = open_source(data, size=size, order=order)
    loaded = load_model(model)
    check_fit(loaded, source, str(model))
    scores = evaluate_model(loaded, source.test, device=resolve_device(device), view_spec=source.view_spec)
    if as_json:
        say(json.dumps({"model": str(model), "net": loaded.name, "n": len(source.test), **scores}))
    else:
        say(
            f"{loaded.name}: top-1 {scores['top1']:.2f}  top-5 {scores['top5']:.2f}  loss {scores['loss']:.4f} "
            f"on {len(source.test)} test images"
        )
