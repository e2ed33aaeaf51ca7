"""`kdfast export`: write a trained network in a format of other software, with a model card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.output import show

Trained = Annotated[
    Path, typer.Argument(help="Folder of a finished run, or a model: T.pt or student.pt.", metavar="RUN")
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        "--size",
        help="Side in pixels of the network's images, if neither RUN nor its file records it.",
        min=1,
        max=65535,
    ),
]


def export(
    run: Trained,
    out: Annotated[Path, typer.Option("--out", help="File to write; its model card is OUT.md.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            help="onnx or torchscript: the network; safetensors or state_dict: its weights alone.",
            metavar="safetensors|onnx|torchscript|state_dict",
        ),
    ] = "safetensors",
    input: Annotated[
        str | None,
        typer.Option(
            "--input",
            help="What the exported network takes. pixels: RGB divided by 255, which it normalizes itself; "
            "normalized: what you have normalized, as the card says. Default: pixels; for weights alone, normalized.",
            metavar="pixels|normalized",
        ),
    ] = None,
    model_net: options.ModelNet = None,
    size: ImageSize = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Export a network, run the file, compare its outputs with the network's, and write a model card beside it."""
    from kdfast.deploy.card import write_card
    from kdfast.deploy.export import TOLERANCE, card_path, check_export, describe
    from kdfast.deploy.export import export as export_network
    from kdfast.deploy.trained import open_trained

    takes = check_export(out, format, input, force=force)
    trained = open_trained(run, None if size is None else (size, size))
    exported = export_network(trained, out, format, takes)
    write_card(trained, exported)
    checked = (
        f"not run: {exported.reason}"
        if exported.difference is None
        else f"run and compared: differs by {exported.difference:.2g} of the largest logit (allowed: {TOLERANCE:g})"
    )
    facts = {
        "out": str(out),
        "card": str(card_path(out)),
        "format": format,
        "difference": exported.difference,
        "tolerance": TOLERANCE,
        "not_run": exported.reason,
        **describe(trained, takes),
    }
    what = f"{trained.model.name}, takes {takes} of {trained.size[1]} x {trained.size[0]}"
    show(f"wrote {out} and {card_path(out).name}: {what}\n{checked}", facts)
