"""`kdfast teacher flatten`: fine-tune a teacher towards a flat minimum, for scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdfast.cli import options
from kdfast.cli.commands import recipe, training
from kdfast.cli.output import show
from kdfast.cli.progress import progress
from kdfast.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from kdfast.nets.checkpoint import Model


def flatten(
    data: options.Data,
    teacher: Annotated[Path, typer.Option("--teacher", help="Teacher, T.pt; it is not changed.")],
    out: Annotated[
        Path, typer.Option("--out", help="Model file to write; until then, OUT.state holds what the command resumes.")
    ],
    teacher_net: options.TeacherNet = None,
    sharpness: Annotated[
        str,
        typer.Option(
            "--sharpness",
            help="Where a step takes its gradient. fsam: at weights moved along the noise of the minibatch gradient, "
            "which takes two passes; lpf: at weights with Gaussian noise; none: at the weights.",
            metavar="fsam|lpf|none",
        ),
    ] = "fsam",
    rho: Annotated[
        float | None,
        typer.Option(
            "--rho",
            help="How far the weights are moved: for fsam the distance; for lpf the standard deviation of the noise, "
            "relative to the norm of each filter. Default: 0.05 for fsam, 0.002 for lpf.",
        ),
    ] = None,
    iterations: Annotated[int, typer.Option("--iterations", help="Steps of SGD.")] = 1000,
    batch_size: training.BatchSize = 128,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of SGD, constant.")] = 0.01,
    momentum: training.Momentum = 0.9,
    clip: recipe.Clip = 1.0,
    held: Annotated[
        float,
        typer.Option(
            "--held",
            help="Share of each class of the training split to hold out and fine-tune on, at least 20 samples, at "
            "most half of the class.",
        ),
    ] = 0.05,
    views: Annotated[
        int, typer.Option("--views", help="Augmentation views per sample; 0: all. 1: the unaugmented image.")
    ] = 0,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    checkpoint_seconds: training.CheckpointSeconds = 30.0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Fine-tune a teacher towards a flat minimum of the loss on held-out training samples, for scores computed on it.

    All weights move; the statistics of batch norms stay. The same command resumes it.
    """
    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import load_model, save_model
    from kdfast.nets.fit import check_fit
    from kdfast.teacher.flatten import FlattenConfig, describe_flattening, flatten_teacher
    from kdfast.teacher.flatten.checkpoint import FlattenCheckpoint

    settings = FlattenConfig(sharpness, rho, iterations, batch_size, lr, momentum, clip, held, views, seed)
    place = resolve_device(device)
    model = load_model(teacher)
    source = open_source(data, size=size, order=order, split=split)
    check_fit(model, source, str(teacher))
    described = describe_flattening(model, source, settings)
    state = out.with_name(f"{out.name}.state")
    flat = None if force else _flattened(out, described)
    if flat is None and not force:
        FlattenCheckpoint(state, described).check()
    if dry_run:
        show(json.dumps(described, indent=2), described)
        return
    if flat is None:
        training.refuse_existing(out, force=force)
        if force:
            FlattenCheckpoint(state, described).delete()
            out.unlink(missing_ok=True)  # else the same command without `force` could not resume
        with progress("flatten") as report:
            flat = flatten_teacher(
                model,
                source,
                settings,
                state=state,
                progress=report,
                device=place,
                checkpoint_seconds=checkpoint_seconds,
            )
        save_model(out, flat)
    state.unlink(missing_ok=True)
    about = flat.metadata["flattened"]
    show(_summarize_flattening(about, len(source.train), out), {**about, "out": str(out)})


def _flattened(out: Path, settings: dict[str, Any]) -> Model | None:
    """Return the finished result of the same command, or None if there is no file.

    Raises:
        OutputError: The file is anything else.
    """
    from kdfast.nets.checkpoint import load_model
    from kdfast.teacher.flatten import is_flattened_from

    if not os.path.lexists(out):
        return None
    try:
        found = load_model(out)
    except CheckpointError:
        found = None
    if found is None or not is_flattened_from(found, settings):
        raise OutputError(f"{out} exists and is not the result of this command; choose another --out, or --force")
    return found


def _summarize_flattening(about: dict[str, Any], samples: int, out: Path) -> str:
    before, after = about["before"], about["after"]
    return (
        f"{about['held_out']} of {samples} training samples held out: loss {before['loss']:.4f} before, "
        f"{after['loss']:.4f} after; top-1 {before['top1']:.2f} before, {after['top1']:.2f} after\n"
        f"{about['iterations']} steps ({about['sharpness']}), {about['images']} images = "
        f"{about['images'] / samples:.2f} epochs of the training split, in {about['seconds']:.1f} s; written to {out}"
    )
