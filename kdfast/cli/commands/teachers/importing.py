"""`kdfast teacher import`: read a teacher that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.commands import training
from kdfast.cli.output import note, show


def import_(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: a .pt, .pth, .th or .safetensors file.")],
    data: options.Data,
    net: options.Net,
    out: Annotated[Path, typer.Option("--out", help="Model file to write, T.pt.")],
    net_arg: options.NetArg = None,
    mean: Annotated[
        str | None,
        typer.Option(
            "--mean",
            help="Channel means the teacher was trained with: a,b,c on a scale of 0 to 1, or one number for all; "
            "default: from the file, if it holds them.",
        ),
    ] = None,
    std: Annotated[
        str | None, typer.Option("--std", help="Channel standard deviations, a,b,c on the same scale, or one number.")
    ] = None,
    key: Annotated[
        str | None,
        typer.Option(
            "--key", help="Key of the weights in the file, a.b for nested ones; default: found automatically."
        ),
    ] = None,
    prefix: Annotated[
        str | None,
        typer.Option(
            "--prefix",
            help="Import only tensors whose names start so, such as student, from a file of several networks.",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            "--ignore",
            help="Leave out tensors of this name; * stands for any text. Repeat it for several.",
            metavar="PATTERN",
        ),
    ] = None,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    device: options.Device = "auto",
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Import a checkpoint: match its layer names, without running code from it, and evaluate it on the test split.

    A checkpoint of kdfast gets the class names of this data, in the data's order.
    """
    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import save_model
    from kdfast.nets.fit import check_fit
    from kdfast.nets.importing import import_checkpoint
    from kdfast.teacher.evaluate import evaluate

    training.refuse_existing(out, force=force)
    normalization = options.parse_normalization(mean, std)
    source = open_source(data, size=size, order=order, split=split)
    model, report = import_checkpoint(
        checkpoint,
        net=options.with_arguments(net, net_arg),
        classes=len(source.classes),
        class_names=source.classes,
        normalization=normalization,
        key=key,
        prefix=prefix,
        ignore=ignore or (),
    )
    check_fit(model, source, str(checkpoint))
    note(report.summary())
    scores = evaluate(model, source.test, device=resolve_device(device), view_spec=source.view_spec)
    model.metadata.update({"imported_from": checkpoint.name, "input_size": list(source.view_spec.size)})
    model.metadata.update({"test_top1": scores["top1"], "test_top5": scores["top5"]})
    save_model(out, model)
    show(
        f"test top-1 {scores['top1']:.2f}  top-5 {scores['top5']:.2f}; written to {out}",
        {"net": model.name, **scores, "summary": report.summary(), "out": str(out)},
    )
