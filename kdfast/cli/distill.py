"""`kdfast distill`: train a student on a subset with a teacher's help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options, training


def distill(
    data: options.Data,
    student: Annotated[str, typer.Option("--student", help="Network, such as resnet8; torchvision:NAME or timm:NAME.")],
    out: Annotated[Path, typer.Option("--out", help="The run's folder; the same command resumes it.")],
    subset: Annotated[
        str | None, typer.Option("--subset", help="idx.npy; without it the whole training split.")
    ] = None,
    cache: Annotated[str | None, typer.Option("--cache", help="The teacher's cache: logits are looked up.")] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            "--teacher",
            help="Without --cache: run this teacher on the fly, on the same views. With it: the "
            "teacher that the cache must be of.",
        ),
    ] = None,
    epochs: training.Epochs = 240,
    batch_size: training.BatchSize = 64,
    lr: training.Lr = 0.05,
    momentum: training.Momentum = 0.9,
    weight_decay: training.WeightDecay = 5e-4,
    schedule: training.Schedule = "step",
    warmup_epochs: training.Warmup = 0.0,
    alpha: Annotated[
        str,
        typer.Option(
            "--alpha",
            help="Weight of the teacher's term in [0, 1]; 0: plain training, without cache and teacher; auto: 1 at a "
            "tenth of the data and less, falling to 0.5 at seven tenths and more.",
        ),
    ] = "auto",
    temperature: Annotated[float, typer.Option("--temperature", help="Temperature of the teacher's term.")] = 4.0,
    views: training.Views = 0,
    view_seed: training.ViewSeed = None,
    loader: options.Loader = "auto",
    precision: training.Precision = "fp32",
    resume: training.Resume = "auto",
    size: options.Size = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    log_every: training.LogEvery = 50,
    eval_every: training.EvalEvery = 0,
    checkpoint_seconds: training.CheckpointSeconds = 30.0,
    tensorboard: training.TensorBoard = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Distill a teacher into a student on a subset of the data.

    The loss is (1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student) at temperature T. The run's folder
    holds config.json, metrics.jsonl, status.json, result.json, student.pt and checkpoints.
    """
    from kdfast.device import resolve_device
    from kdfast.distill.folder import check_run_folder
    from kdfast.distill.plan import Inputs, prepare

    plan = prepare(
        Inputs(data=data, subset=subset, cache=cache, teacher=teacher, loader=loader, size=size),
        {
            "student": student,
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "warmup_epochs": warmup_epochs,
            "temperature": temperature,
            "views": views,
            "view_seed": view_seed,
            "precision": precision,
            "seed": seed,
        },
        alpha=alpha,
        device=resolve_device(device),
    )
    if dry_run:
        check_run_folder(out, plan.identity, resume)
        print(json.dumps(plan.describe(), indent=2))
        return
    result = training.run(
        plan,
        out,
        label=f"distill {student}",
        resume=resume,
        log_every=log_every,
        eval_every=eval_every,
        checkpoint_seconds=checkpoint_seconds,
        tensorboard=tensorboard,
    )
    if plan.ranks.main:
        print(training.summary(result, out))
