"""`kdfast teacher`: train a teacher, import one, or flatten it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdfast.cli import options
from kdfast.cli.command import Command
from kdfast.cli.commands import recipe, training
from kdfast.cli.output import note, show
from kdfast.cli.progress import progress
from kdfast.errors import CheckpointError, OutputError, SubsetError, UsageError

if TYPE_CHECKING:
    from kdfast.data.source import Source
    from kdfast.data.subset import Subset
    from kdfast.distillation.config import RunConfig
    from kdfast.distillation.plan import Plan
    from kdfast.nets.checkpoint import Model

app = typer.Typer(help="Train a teacher, import one trained elsewhere, or flatten it for scores.", no_args_is_help=True)


@app.command("train", cls=Command)
def train(
    data: options.Data,
    net: options.Net,
    out: Annotated[Path, typer.Option("--out", help="Model file to write, T.pt; the run folder is T.pt.run.")],
    subset: Annotated[
        str | None,
        typer.Option(
            "--subset",
            help="Train on the samples of this subset file only, idx.npy, or one of your own; default: the whole "
            "training split.",
            metavar=options.PATH,
        ),
    ] = None,
    fraction: Annotated[
        float | None,
        typer.Option(
            "--fraction",
            help="Train on this share of the training split, the samples that `kdfast prune` draws at random with "
            "the same seed; they are written to T.pt.subset.npy.",
            metavar="NUMBER",
        ),
    ] = None,
    net_arg: options.NetArg = None,
    init: options.Init = None,
    epochs: training.Epochs = 240,
    batch_size: training.BatchSize = 64,
    lr: training.Lr = 0.05,
    momentum: training.Momentum = 0.9,
    weight_decay: training.WeightDecay = 5e-4,
    schedule: training.Schedule = "step",
    warmup_epochs: training.Warmup = 0.0,
    optimizer: recipe.Optimizer = "sgd",
    label_smoothing: recipe.LabelSmoothing = 0.0,
    ema: recipe.Ema = 0.0,
    clip: recipe.Clip = 0.0,
    augment: recipe.Augment = None,
    mixup: recipe.Mixup = 0.0,
    cutmix: recipe.CutMix = 0.0,
    views: training.Views = 0,
    loader: options.Loader = "auto",
    precision: options.Precision = "fp32",
    resume: training.Resume = "auto",
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    log_every: training.LogEvery = 50,
    eval_every: training.EvalEvery = 0,
    checkpoint_seconds: training.CheckpointSeconds = 30.0,
    track: training.Track = None,
    tensorboard: training.TensorBoard = False,
    keep_checkpoints: training.KeepCheckpoints = False,
    compile_network: training.Compile = False,
    cuda_graph: training.CudaGraph = True,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    write_config: options.WriteConfig = None,
) -> None:
    """Train a network on the labels of the training split, or of a part of it; the same command resumes it.

    The defaults are the recipe of RepDistiller, with which the pruning paper trains: SGD with momentum 0.9 and weight
    decay 5e-4 on batches of 64, 240 epochs, a learning rate of 0.05 that is divided by ten after 150, 180 and 210.
    """
    from kdfast.device import resolve_device
    from kdfast.distillation.config import Execution, RunConfig
    from kdfast.distillation.folder import check_run_folder
    from kdfast.distillation.inputs import InputPaths, plan_run
    from kdfast.nets.checkpoint import load_model, save_model

    folder, part = out.parent / f"{out.name}.run", out.parent / f"{out.name}.subset.npy"
    if subset is not None and fraction is not None:
        raise UsageError("--subset and --fraction both choose the samples to train on: pass one of them")
    trackers, resume = training.load_trackers(track, tensorboard), training.resume_mode(resume, force)
    if force:
        training.refuse_existing(out, force=True)
    else:
        training.check_trained_model(out, folder)
    place = resolve_device(device)
    settings = RunConfig(
        student=options.with_arguments(net, net_arg),
        init=init,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        momentum=momentum,
        weight_decay=weight_decay,
        schedule=schedule,
        warmup_epochs=warmup_epochs,
        views=views,
        precision=options.choose_precision(precision, place),
        seed=seed,
        optimizer=optimizer,
        label_smoothing=label_smoothing,
        ema=ema,
        clip=clip,
        mixup=mixup,
        cutmix=cutmix,
    )
    plan = plan_run(
        InputPaths(data, subset, loader=loader, size=size, order=order, split=split, augment=augment),
        settings,
        device=place,
        execution=Execution(compile_network, cuda_graph),
        choose=None if fraction is None else lambda source: _draw_part(source, fraction, settings),
    )
    if dry_run:
        show(json.dumps(plan.describe(), indent=2), plan.describe())
        return
    check_run_folder(folder, plan.identity, resume)
    if plan.distributed.is_main:
        _write_part(part, plan, None if fraction is None else _draw_part(plan.source, fraction, settings), force)
    result = training.run(
        plan,
        folder,
        label=f"train {net}",
        resume=resume,
        log_every=log_every,
        eval_every=eval_every,
        checkpoint_seconds=checkpoint_seconds,
        trackers=trackers,
        keep_checkpoints=keep_checkpoints,
        replaced=out if force else None,
    )
    if plan.distributed.is_main:
        save_model(out, load_model(folder / "student.pt"))
        show(training.summary(result, out), {**result, "out": str(out)})


def _draw_part(source: Source, fraction: float, settings: RunConfig) -> Subset:
    """Draw the samples to train on.

    Raises:
        SubsetError: The fraction leaves a class empty, or does not fill a batch.
    """
    from kdfast.data.subset import Subset
    from kdfast.pruning.request import PruneRequest

    (drawn,) = PruneRequest(fractions=(fraction,), seed=settings.seed).run(source)
    if len(drawn.ids) < settings.batch_size:
        raise SubsetError(
            f"`fraction` is {fraction:g}, which keeps {len(drawn.ids)} of {len(source.train)} samples, fewer than one "
            f"batch of {settings.batch_size}: raise it or lower `batch_size`"
        )
    return Subset(drawn.ids, drawn.provenance, None)


def _write_part(path: Path, plan: Plan, drawn: Subset | None, force: bool) -> None:
    """Write the samples that were drawn to train on, for the subsets of students; delete those of a replaced teacher.

    Raises:
        OutputError: The file holds other samples than those of this run and `force` is False, or is none of kdfast.
    """
    import numpy as np

    from kdfast.data.subset import check_subset_path, digest_of, read_origin, write_subset

    check_subset_path(path)
    held = read_origin(path)
    same = held is not None and held["ids"] == digest_of(np.sort(plan.ids))
    options.refuse_other(path, held is None or same, force)
    if drawn is not None and not same:
        assert drawn.provenance is not None
        write_subset(path, drawn.ids, drawn.provenance)
    elif held is not None and not same:
        path.unlink()
        path.with_suffix(".json").unlink()


@app.command("import", cls=Command)
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


@app.command("flatten", cls=Command)
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

    settings = FlattenConfig(sharpness, rho, iterations, batch_size, lr, momentum, held, views, seed)
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
