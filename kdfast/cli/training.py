"""What `kdfast distill` and `kdfast teacher train` share: options, the run itself, its summary."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdfast.cli.progress import progress
from kdfast.errors import OutputError, UsageError

if TYPE_CHECKING:
    from kdfast.distill.plan import Plan

Epochs = Annotated[int, typer.Option("--epochs", help="Passes over the samples.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Samples a step.")]
Lr = Annotated[float, typer.Option("--lr", help="Highest learning rate of SGD.")]
Momentum = Annotated[float, typer.Option("--momentum", help="Momentum, without Nesterov.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="L2 on every parameter.")]
Schedule = Annotated[
    str, typer.Option("--schedule", help="step (a tenth after 62.5%, 75%, 87.5% of the run), cosine or constant.")
]
Warmup = Annotated[float, typer.Option("--warmup-epochs", help="Epochs of linear warm-up.")]
Views = Annotated[
    int,
    typer.Option(
        "--views",
        help="Distinct augmentation views a sample may be seen in; 0: all the cache holds, or all "
        "there are; 1: the image as it is, an approximation that overfits fixed targets.",
    ),
]
ViewSeed = Annotated[
    int | None,
    typer.Option("--view-seed", help="Seed of the choice of those views; by default the cache's, or 0.", min=0),
]
Precision = Annotated[str, typer.Option("--precision", help="fp32, or bf16 / fp16 for automatic mixed precision.")]
Resume = Annotated[str, typer.Option("--resume", help="auto: go on with what --out holds; never: want none there.")]
LogEvery = Annotated[int, typer.Option("--log-every", help="Steps between two rows of metrics.jsonl.", min=1)]
EvalEvery = Annotated[
    int, typer.Option("--eval-every", help="Epochs between two looks at the test split, for curves; 0: none.", min=0)
]
CheckpointSeconds = Annotated[
    float, typer.Option("--checkpoint-seconds", help="Seconds between two checkpoints.", min=0.0)
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="Also write TensorBoard events into the folder.")]


def run(
    plan: Plan,
    out: Path,
    *,
    label: str,
    resume: str,
    log_every: int,
    eval_every: int,
    checkpoint_seconds: float,
    tensorboard: bool,
) -> dict[str, Any]:
    """Claim the folder and train, under a progress bar."""
    from kdfast.distill.folder import RunFolder
    from kdfast.distill.train import Watch, train

    with (
        progress(label, shown=plan.ranks.main) as report,
        plan.ranks.group(plan.device),
        RunFolder(out, plan.identity, facts=plan.facts, resume=resume, writes=plan.ranks.main) as folder,
        contextlib.ExitStack() as stack,
    ):
        writer = None
        if tensorboard and plan.ranks.main:
            writer = _writer(out)
            stack.callback(writer.close)
        return train(plan, folder, Watch(log_every, eval_every, checkpoint_seconds, writer, report))


def _writer(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UsageError("--tensorboard needs the package tensorboard: pip install 'kdfast[tensorboard]'") from error
    return SummaryWriter(str(out / "tensorboard"))


def refuse_existing(out: Path) -> None:
    """Make sure that a model's file is not there yet and can be written, before the work it is to hold.

    Raises:
        OutputError: If it is there, or its folder cannot be written.
    """
    from kdfast.files import check_writable

    if out.exists():
        raise OutputError(f"{out} exists; choose another --out, or delete it")
    check_writable(out.parent)


def summary(result: dict[str, Any], out: Path) -> str:
    """Two lines about a finished run."""
    side = (
        f"alpha {result['alpha']:g}"
        if result["targets"] is None
        else (f"alpha {result['alpha']:g}, targets from {result['targets']}, {result['views']} views")
    )
    return (
        f"top-1 {result['test_top1']:.2f}  top-5 {result['test_top5']:.2f}  on the test split "
        f"({result['kept']} samples kept, {side})\n"
        f"{result['steps']} steps, {result['images']} images in {result['seconds']:.1f} s "
        f"({result['images_per_second']:.0f} images/s, {result['loader']} loader); written to {out}"
    )
