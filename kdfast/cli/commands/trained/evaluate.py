"""`kdfast eval`: evaluate a model on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdfast.cli import options
from kdfast.cli.output import show


def evaluate(
    data: options.Data,
    model: Annotated[Path, typer.Option("--model", help="Model, T.pt, or the folder of a run.")],
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Teacher, T.pt, to also count the images on which both agree.")
    ] = None,
    per_class: Annotated[bool, typer.Option("--per-class", help="Also print the accuracy of each class.")] = False,
    model_net: options.ModelNet = None,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    device: options.Device = "auto",
    config: options.Config = None,
) -> None:
    """Print a model's accuracy on the test split in percent, its loss in nats, and its calibration error.

    The calibration error is that of the predicted class, in 15 bins of equal width over its probability.
    """
    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import load_model
    from kdfast.nets.fit import check_fit
    from kdfast.teacher.evaluate import evaluate_in_detail

    loaded = load_model(model)
    other = None if teacher is None else load_model(teacher)
    source = open_source(data, size=size, order=order, split=split)
    check_fit(loaded, source, str(model))
    if other is not None:
        check_fit(other, source, str(teacher))
    scores = evaluate_in_detail(
        loaded, source.test, teacher=other, device=resolve_device(device), view_spec=source.view_spec
    )
    facts = {"model": str(model), "net": loaded.name, "n": len(source.test), "classes": list(source.classes), **scores}
    show("\n".join(_describe(facts, per_class)), facts)


def _describe(facts: dict[str, Any], per_class: bool) -> list[str]:
    calibration = facts["calibration"]
    lines = [
        f"{facts['net']}: top-1 {facts['top1']:.2f}  top-5 {facts['top5']:.2f}  loss {facts['loss']:.4f} "
        f"on {facts['n']} test images",
        f"calibration error {calibration['ece']:.2f} ({calibration['bins']} bins), "
        f"mean confidence {calibration['confidence']:.2f}",
    ]
    if "agreement" in facts:
        lines.append(f"agrees with the teacher on {facts['agreement']:.2f}% of the images")
    if per_class:
        pairs = zip(facts["classes"], facts["per_class"], strict=True)
        lines += [f"  {'no images' if value is None else f'{value:6.2f}'}  {name}" for name, value in pairs]
    return lines
