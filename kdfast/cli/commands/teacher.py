"""`kdfast teacher`: train a teacher, or import one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options
from kdfast.cli.command import Command
from kdfast.cli.commands import training
from kdfast.cli.output import say
from kdfast.errors import UsageError

app = typer.Typer(help="Train a teacher, or import one trained elsewhere.", no_args_is_help=True)


@app.command("train", cls=Command)
def train(
    data: options.Data,
    net: options.Net,
    out: Annotated[Path, typer.Option("--out", help="Model file to write, T.pt; the run folder is T.pt.run.")],
    epochs: training.Epochs = 240,
    batch_size: training.BatchSize = 64,
    lr: training.Lr = 0.05,
    momentum: training.Momentum = 0.9,
    weight_decay: training.WeightDecay = 5e-4,
    schedule: training.Schedule = "step",
    warmup_epochs: training.Warmup = 0.0,
    views: training.Views = 0,
    loader: options.Loader = "auto",
    precision: options.Precision = "fp32",
    resume: training.Resume = "auto",
    size: options.Size = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    log_every: training.LogEvery = 50,
    eval_every: training.EvalEvery = 0,
    checkpoint_seconds: training.CheckpointSeconds = 30.0,
    tensorboard: training.TensorBoard = False,
    compile_network: training.Compile = False,
    cuda_graph: training.CudaGraph = True,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Train a network on the labels of the whole training split; the same command resumes it."""
    from kdfast.device import resolve_device
    from kdfast.distill.config import Execution, RunConfig
    from kdfast.distill.plan import InputPaths, plan_run
    from kdfast.nets.checkpoint import load_model, save_model

    folder = out.parent / f"{out.name}.run"
    training.check_trained_model(out, folder)
    place = resolve_device(device)
    settings = RunConfig(
        student=net,
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
    )
    plan = plan_run(
        InputPaths(data=data, loader=loader, size=size),
        settings,
        device=place,
        execution=Execution(compile_network, cuda_graph),
    )
    if dry_run:
        say(json.dumps(plan.describe(), indent=2))
        return
    result = training.run(
        plan,
        folder,
        label=f"train {net}",
        resume=resume,
        log_every=log_every,
        eval_every=eval_every,
        checkpoint_seconds=checkpoint_seconds,
        tensorboard=tensorboard,
    )
    if plan.distributed.is_main:
        save_model(out, load_model(folder / "student.pt"))
        say(training.summary(result, out))


@app.command("import", cls=Command)
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint: a .pt, .pth, .th or .safetensors file.")],
    data: options.Data,
    net: options.Net,
    mean: Annotated[
        str, typer.Option("--mean", help="Channel means the teacher was trained with: a,b,c on a scale of 0 to 1.")
    ],
    std: Annotated[str, typer.Option("--std", help="Channel standard deviations, a,b,c on the same scale.")],
    out: Annotated[Path, typer.Option("--out", help="Model file to write, T.pt.")],
    key: Annotated[
        str | None,
        typer.Option(
            "--key", help="Key of the weights in the file, a.b for nested ones; default: found automatically."
        ),
    ] = None,
    size: options.Size = None,
    device: options.Device = "auto",
    config: options.Config = None,
) -> None:
    """Import a checkpoint: match its layer names, without running code from it, and evaluate it on the test split."""
    from kdfast.data.readers.registry import open_source
    from kdfast.data.views import Normalization
    from kdfast.device import resolve_device
    from kdfast.nets.checkpoint import import_checkpoint, save_model
    from kdfast.teacher.evaluate import evaluate

    training.refuse_existing(out)
    normalization = Normalization(_triple("--mean", mean), _triple("--std", std))
    source = open_source(data, size=size)
    model, report = import_checkpoint(
        checkpoint,
        net=net,
        classes=len(source.classes),
        class_names=source.classes,
        normalization=normalization,
        key=key,
    )
    say(report.summary())
    scores = evaluate(model, source.test, device=resolve_device(device), view_spec=source.view_spec)
    model.metadata.update({"imported_from": checkpoint.name, "test_top1": scores["top1"], "test_top5": scores["top5"]})
    save_model(out, model)
    say(f"test top-1 {scores['top1']:.2f}  top-5 {scores['top5']:.2f}; written to {out}")


def _triple(flag: str, text: str) -> tuple[float, float, float]:
    try:
        first, second, third = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"{flag} is {text!r}: pass three numbers, a,b,c") from error
    return first, second, third
