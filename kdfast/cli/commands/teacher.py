"""`kdfast teacher`: train a teacher, or import one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdfast.cli import options
from kdfast.cli.command import Command
from kdfast.cli.commands import training
from kdfast.cli.output import say
from kdfast.errors import UsageError

if TYPE_CHECKING:
    from kdfast.data.views import Normalization

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
    order: options.Order = "path",
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
        InputPaths(data=data, loader=loader, size=size, order=order),
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
    out: Annotated[Path, typer.Option("--out", help="Model file to write, T.pt.")],
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
    device: options.Device = "auto",
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

    training.refuse_existing(out)
    normalization = _normalization(mean, std)
    source = open_source(data, size=size, order=order)
    model, report = import_checkpoint(
        checkpoint,
        net=net,
        classes=len(source.classes),
        class_names=source.classes,
        normalization=normalization,
        key=key,
        prefix=prefix,
        ignore=ignore or (),
    )
    check_fit(model, source, str(checkpoint))
    say(report.summary())
    scores = evaluate(model, source.test, device=resolve_device(device), view_spec=source.view_spec)
    model.metadata.update({"imported_from": checkpoint.name, "test_top1": scores["top1"], "test_top5": scores["top5"]})
    save_model(out, model)
    say(f"test top-1 {scores['top1']:.2f}  top-5 {scores['top5']:.2f}; written to {out}")


def _normalization(mean: str | None, std: str | None) -> Normalization | None:
    from kdfast.data.views import Normalization

    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise UsageError("pass --mean and --std together, or neither where the file holds the normalization")
    return Normalization(_triple("--mean", mean), _triple("--std", std))


def _triple(flag: str, text: str) -> tuple[float, float, float]:
    try:
        numbers = [float(part) for part in text.split(",")]
        first, second, third = numbers * 3 if len(numbers) == 1 else numbers
    except ValueError as error:
        raise UsageError(f"{flag} is {text!r}: pass three numbers, a,b,c, or one for all channels") from error
    return first, second, third
