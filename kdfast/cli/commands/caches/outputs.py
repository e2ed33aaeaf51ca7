"""`kdfast cache import`: make a cache of logits that another program computed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from kdfast.cli import options
from kdfast.cli.output import show
from kdfast.cli.progress import progress


def import_outputs(
    logits: Annotated[
        Path,
        typer.Argument(
            help="Outputs of a network on the training split, .npy, .npz, .pt or .safetensors: (N, C), or (N, V, C) "
            "on V views.",
            metavar="LOGITS",
        ),
    ],
    data: options.Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of the cache.")],
    features: Annotated[
        Path | None,
        typer.Option("--features", help="Inputs of the network's last layer, (N, D), for methods that need them."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            help="What LOGITS holds; default: logits, unless they look like probabilities.",
            metavar="logits|probabilities|log-probabilities",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", help="What the logits were divided by, also before a softmax.")
    ] = 1.0,
    view_seed: Annotated[int, typer.Option("--view-seed", help="Seed that chose the views.", min=0, max=2**63 - 1)] = 0,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the stored logits.", metavar="float16|float32")
    ] = "float16",
    key: Annotated[
        str | None, typer.Option("--key", help="Name of the logits in a file of several arrays.", metavar="KEY")
    ] = None,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    force: options.Force = False,
    config: options.Config = None,
) -> None:
    """Make a cache of logits that another program computed. Row i is training sample i, and column c its class c.

    On (N, C), students see the images without augmentation, as the network did.
    """
    from kdfast.data.readers.registry import open_source
    from kdfast.teacher.writing.outputs import teacher_outputs

    source = open_source(data, size=size, order=order, split=split)
    with progress("cache") as report:
        cache = teacher_outputs(
            logits,
            source,
            out,
            features=features,
            kind=cast(Any, kind),
            temperature=temperature,
            view_seed=view_seed,
            dtype=dtype,
            key=key,
            force=force,
            progress=report,
        )
    top1, width = cache.manifest["train_top1"], cache.manifest["features"]
    show(
        f"imported {len(cache)} samples x {cache.n_views} views x {cache.classes} classes"
        f"{f' and {width} features' if width else ', without features'}; top-1: {top1:.2f} on these samples"
        f"{'; students will see the images without augmentation' if cache.n_views == 1 else ''}",
        {
            "samples": len(cache),
            "views": cache.n_views,
            "classes": cache.classes,
            "features": width,
            "train_top1": top1,
            "out": str(out),
        },
    )
