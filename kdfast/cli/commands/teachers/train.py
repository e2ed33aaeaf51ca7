"""`kdfast teacher train`: train a teacher, on all samples or a part of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdfast.cli import options
from kdfast.cli.commands import recipe, training
from kdfast.cli.output import show
from kdfast.errors import SubsetError, UsageError

if TYPE_CHECKING:
    from kdfast.data.source import Source
    from kdfast.data.subset import Subset
    from kdfast.distillation.config import RunConfig
    from kdfast.distillation.plan import Plan


def train(
    context: typer.Context,
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
    epochs: training.RunEpochs = None,
    steps: training.Steps = None,
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
        **training.length(context, epochs, steps),
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
