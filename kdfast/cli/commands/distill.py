"""`kdfast distill`: train a student on a subset, with a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.commands import recipe, training
from kdfast.cli.output import show


def distill(
    context: typer.Context,
    data: options.Data,
    student: options.Student,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run; the same command resumes it.")],
    subset: Annotated[
        str | None,
        typer.Option(
            "--subset",
            help="Subset file, idx.npy, or one of your own (.npy, .txt, .csv, .pt); default: the whole training split.",
            metavar=options.PATH,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option("--cache", help="Teacher's cache, to look its logits up.", metavar=options.PATH),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="Teacher, T.pt. Without --cache, it runs on the same views during training; with --cache, the cache "
            "must be of this teacher.",
            metavar=options.PATH,
        ),
    ] = None,
    net_arg: options.NetArg = None,
    init: options.Init = None,
    teacher_net: options.TeacherNet = None,
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
    alpha: training.Alpha = "auto",
    temperature: training.Temperature = 4.0,
    ce_weight: training.CeWeight = None,
    kd_term: training.KdTerm = None,
    kd_weight: training.KdWeight = None,
    kd_preset: training.KdPreset = "paper",
    tap: training.Tap = None,
    initial_epochs: training.InitialEpochs = None,
    reshape_logits: training.ReshapeLogits = False,
    kd_warmup_epochs: training.KdWarmup = 0.0,
    list_terms: training.ListTerms = False,
    views: training.Views = 0,
    view_seed: training.ViewSeed = None,
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
    """Distill a teacher into a student on a subset of the data.

    The loss is (1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student) at temperature T, plus the weighted
    terms of --kd-term. The run folder contains config.json, metrics.jsonl, status.json, result.json, student.pt and
    checkpoints.
    """
    from kdfast.device import resolve_device
    from kdfast.distillation.config import Execution, RunConfig
    from kdfast.distillation.folder import check_run_folder
    from kdfast.distillation.inputs import InputPaths, plan_run
    from kdfast.distillation.losses.settings import parse_taps, parse_terms

    trackers, resume = training.load_trackers(track, tensorboard), training.resume_mode(resume, force)
    place = resolve_device(device)
    plan = plan_run(
        InputPaths(
            data=data,
            subset=subset,
            cache=cache,
            teacher=teacher,
            loader=loader,
            size=size,
            order=order,
            split=split,
            augment=augment,
        ),
        RunConfig(
            student=options.with_arguments(student, net_arg),
            init=init,
            **training.length(context, epochs, steps),
            batch_size=batch_size,
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            schedule=schedule,
            warmup_epochs=warmup_epochs,
            temperature=temperature,
            views=views,
            view_seed=view_seed,
            precision=options.choose_precision(precision, place),
            seed=seed,
            ce=ce_weight,
            terms=parse_terms(kd_term or [], kd_weight or [], kd_preset),
            taps=parse_taps(tap or []),
            initial_epochs=initial_epochs,
            terms_warmup_epochs=kd_warmup_epochs,
            reshape_logits=reshape_logits,
            optimizer=optimizer,
            label_smoothing=label_smoothing,
            ema=ema,
            clip=clip,
            mixup=mixup,
            cutmix=cutmix,
        ),
        alpha=alpha,
        device=place,
        execution=Execution(compile_network, cuda_graph),
    )
    if dry_run:
        check_run_folder(out, plan.identity, resume)
        show(json.dumps(plan.describe(), indent=2), plan.describe())
        return
    result = training.run(
        plan,
        out,
        label=f"distill {student}",
        resume=resume,
        log_every=log_every,
        eval_every=eval_every,
        checkpoint_seconds=checkpoint_seconds,
        trackers=trackers,
        keep_checkpoints=keep_checkpoints,
    )
    if plan.distributed.is_main:
        show(training.summary(result, out), {**result, "out": str(out)})
