"""`kdfast data`: describe a source of data, convert it for FFCV, flip labels."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.command import Command
from kdfast.cli.output import show
from kdfast.cli.progress import announce, progress

app = typer.Typer(help="Describe a source of data, convert it to FFCV files, or flip labels.", no_args_is_help=True)

Src = Annotated[str, typer.Argument(help="Source of data, as for --data of other commands.")]


@app.command("info", cls=Command)
def info(src: Src, size: options.Size = None, order: options.Order = "path", split: options.Split = None) -> None:
    """Print the kind, splits, classes, views, statistics and fingerprint of a source."""
    from kdfast.data.readers.registry import open_source
    from kdfast.data.source import compute_normalization
    from kdfast.errors import DataWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)  # printed below
        source = open_source(src, size=size, order=order, split=split)
    normalization = compute_normalization(source.train)
    height, width, _ = source.train.shape
    counts = [int((source.train.labels == label).sum()) for label in range(len(source.classes))]
    lines = [
        f"{source.path}: {source.kind}, {len(source.train)} training and {len(source.test)} test images",
        f"images       {height} x {width} x 3, uint8{', gray: three equal channels' * source.gray}",
        f"classes      {len(source.classes)}: {', '.join(source.classes[:10])}{', ...' * (len(source.classes) > 10)}",
        f"per class    {min(counts)} to {max(counts)} training images",
        f"views        {source.view_spec.count} ({source.view_spec.kind}{', flipped too' * source.view_spec.flip})",
        f"mean         {', '.join(f'{m:.4f}' for m in normalization.mean)}",
        f"std          {', '.join(f'{s:.4f}' for s in normalization.std)}",
        f"fingerprint  {source.fingerprint}",
        *(f"note         {note}" for note in source.notes),
    ]
    facts = {
        "path": source.path,
        "kind": source.kind,
        "train": len(source.train),
        "test": len(source.test),
        "shape": list(source.train.shape),
        "gray": source.gray,
        "classes": list(source.classes),
        "per_class": counts,
        "views": source.view_spec.to_dict() | {"count": source.view_spec.count},
        "mean": list(normalization.mean),
        "std": list(normalization.std),
        "fingerprint": source.fingerprint,
        "notes": list(source.notes),
    }
    show("\n".join(lines), facts)


@app.command("convert", cls=Command)
def convert(
    src: Src,
    out: Annotated[Path, typer.Argument(help="Folder to write train.beton and test.beton into.")],
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    jpeg: Annotated[
        int | None,
        typer.Option(
            "--jpeg",
            help="JPEG quality, 50 to 100: other pixels, so a data set with caches and subsets of its own; default: "
            "store raw pixels.",
            min=50,
            max=100,
        ),
    ] = None,
    force: options.Force = False,
    dry_run: options.DryRun = False,
) -> None:
    """Write a source as FFCV files; they get their names only after they are read back and verified."""
    from kdfast.data.ffcv.write import check_out_folder, delete_conversion
    from kdfast.data.ffcv.write import convert as convert_source
    from kdfast.data.readers.registry import open_source
    from kdfast.estimates import estimate_reading

    source = open_source(src, size=size, order=order, split=split)
    check_out_folder(out, source)
    pixels = source.train.shape[0] * source.train.shape[1] * 3
    total = (len(source.train) + len(source.test)) * pixels
    if jpeg is None:  # the size of compressed images is not known before
        announce(out, total, estimate_reading(source.train))
    if dry_run:
        show(
            f"would write {len(source.train)} + {len(source.test)} images to {out}, about {total / 1e6:.0f} MB raw",
            {"dry_run": True, "train": len(source.train), "test": len(source.test), "bytes": total, "out": str(out)},
        )
        return
    if force:
        delete_conversion(out, source)
    with progress("convert") as report:
        convert_source(source, out, jpeg_quality=jpeg, progress=report)
    show(
        f"wrote and verified train.beton ({len(source.train)}) and test.beton ({len(source.test)}) in {out}",
        {"train": len(source.train), "test": len(source.test), "out": str(out)},
    )


@app.command("flip", cls=Command)
def flip(
    src: Src,
    out: Annotated[Path, typer.Argument(help="Folder of the new source, which refers to the images of SRC.")],
    share: Annotated[float, typer.Option("--share", help="Share of the training labels to change, in (0, 1).")] = 0.1,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    seed: options.Seed = 0,
    force: options.Force = False,
) -> None:
    """Make a source in which a seeded share of the training labels is wrong; the test split is unchanged."""
    from kdfast.data.readers.registry import open_source
    from kdfast.data.readers.relabel import write_flipped

    source = open_source(src, size=size, order=order, split=split)
    changed = write_flipped(source, src, out, share=share, seed=seed, replace=force)
    again = "" if split is None else f" with --split {split}"
    show(
        f"{len(changed)} training labels of {src} changed; pass {out} as --data{again}",
        {"changed": len(changed), "src": src, "out": str(out)},
    )
