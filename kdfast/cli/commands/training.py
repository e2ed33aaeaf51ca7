"""Options of the commands that train a network, and the run that `kdfast distill` and `kdfast teacher train` share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kdfast.cli import options, term_help
from kdfast.cli.commands import recipe
from kdfast.cli.output import MODE, log_event
from kdfast.cli.progress import progress
from kdfast.errors import OutputError, UsageError

if TYPE_CHECKING:
    from kdfast.distillation.plan import Plan
    from kdfast.trackers import TrackerSet

Epochs = Annotated[int, typer.Option("--epochs", help="Passes over the training samples.")]
DEFAULT_EPOCHS = 240
# Epochs or steps, see `length`.
RunEpochs = Annotated[
    int | None, typer.Option("--epochs", help=f"Passes over the training samples. Default: {DEFAULT_EPOCHS}.")
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="Steps of the training, in place of --epochs; the last epoch may end early.", min=1),
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Samples per step.")]
Lr = Annotated[float, typer.Option("--lr", help="Peak learning rate.")]
Momentum = Annotated[float, typer.Option("--momentum", help="Momentum of SGD, or beta1 of AdamW, in [0, 1).")]
WeightDecay = Annotated[
    float, typer.Option("--weight-decay", help="L2 penalty on every parameter; decoupled for AdamW.")
]
Schedule = Annotated[
    str,
    typer.Option(
        "--schedule",
        help="Learning rate over the run: step (divided by ten after 62.5%, 75% and 87.5%), cosine or constant.",
        metavar="step|cosine|constant",
    ),
]
Warmup = Annotated[float, typer.Option("--warmup-epochs", help="Epochs of linear warm-up of the learning rate.")]
Views = Annotated[
    int,
    typer.Option(
        "--views",
        help="Augmentation views per sample. 0: all views of the cache, or all that exist. 1: the unaugmented image, "
        "which overfits its fixed targets.",
    ),
]
ViewSeed = Annotated[
    int | None,
    typer.Option(
        "--view-seed", help="Seed that chooses those views; default: the cache's, else 0.", min=0, max=2**63 - 1
    ),
]
Alpha = Annotated[
    str,
    typer.Option(
        "--alpha",
        help="Weight of the teacher's term, in [0, 1]. 0: train on the labels alone, without cache or teacher. auto: 1 "
        "up to a tenth of the data, falling linearly to 0.5 at seven tenths and above.",
        metavar="NUMBER|auto",
    ),
]
Temperature = Annotated[float, typer.Option("--temperature", help="Temperature of the teacher's term, above 0.")]
CeWeight = Annotated[
    float | None,
    typer.Option(
        "--ce-weight",
        help="Weight of the cross-entropy with the labels; --alpha may then exceed 1. Default: 1 - alpha.",
    ),
]
KdTerm = Annotated[
    list[str] | None,
    typer.Option(
        "--kd-term",
        help="Further term of the loss, NAME or NAME:option=number,...; repeatable. --list-terms prints them.",
        metavar="TERM",
    ),
]
KdWeight = Annotated[
    list[float] | None,
    typer.Option("--kd-weight", help="Weight of a term, in the order of --kd-term; repeatable."),
]
KdPreset = Annotated[
    str,
    typer.Option(
        "--kd-preset",
        help="Weights of the terms without --kd-weight. paper: 1, as in the comparison under pruning; tuned: those of "
        "RepDistiller's scripts, or of the term's paper.",
        metavar="paper|tuned",
    ),
]
Tap = Annotated[
    list[str] | None,
    typer.Option(
        "--tap",
        help="Where a term reads an activation: student.NAME=MODULE or teacher.NAME=MODULE, with a NAME that "
        "--list-terms prints; MODULE@input is what enters a module. Repeatable. Default: known for kdfast's networks.",
        metavar="SIDE.NAME=MODULE",
    ),
]
InitialEpochs = Annotated[
    int | None,
    typer.Option(
        "--initial-epochs",
        help="The first epochs, in which ab and fsp train alone and ft is prepared. Default: an eighth of "
        "the whole epochs, at least one and not all, if there is such a term.",
        min=0,
    ),
]
ReshapeLogits = Annotated[
    bool,
    typer.Option(
        "--reshape-logits",
        help="Give a sample's logits the mean spread of its class in the cache, which must cover the whole training "
        "split (ICLR 2025, with the method medium).",
    ),
]
KdWarmup = Annotated[
    float,
    typer.Option(
        "--kd-warmup-epochs", help="Epochs over which the weights of --kd-term rise linearly from 0.", min=0.0
    ),
]
ListTerms = Annotated[
    bool,
    typer.Option(
        "--list-terms", help="Print the terms of the loss and exit.", is_eager=True, callback=term_help.list_terms
    ),
]
Resume = Annotated[
    str,
    typer.Option("--resume", help="auto: resume the run in --out; never: fail if one exists.", metavar="auto|never"),
]
LogEvery = Annotated[int, typer.Option("--log-every", help="Steps between two rows of metrics.jsonl.", min=1)]
EvalEvery = Annotated[
    int, typer.Option("--eval-every", help="Epochs between evaluations on the test split; 0: only at the end.", min=0)
]
CheckpointSeconds = Annotated[
    float, typer.Option("--checkpoint-seconds", help="Seconds between two checkpoints.", min=0.0)
]
Compile = Annotated[
    bool,
    typer.Option("--compile", help="Compile the network with torch.compile: a slow start, then faster steps on a GPU."),
]
CudaGraph = Annotated[
    bool,
    typer.Option(
        "--cuda-graph/--no-cuda-graph",
        help="On a GPU, replay each step as one CUDA graph. Not for networks that change with their input.",
    ),
]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", hidden=True)]
Track = Annotated[
    list[str] | None,
    typer.Option(
        "--track",
        help="Also send the metrics to a tracker of experiments, whose package must be installed; repeatable.",
        metavar="tensorboard|wandb|mlflow|trackio",
    ),
]
KeepCheckpoints = Annotated[
    bool, typer.Option("--keep-checkpoints", help="Keep the checkpoints of the finished run; default: delete them.")
]


def run(
    plan: Plan,
    out: Path,
    *,
    label: str,
    resume: str,
    log_every: int,
    eval_every: int,
    checkpoint_seconds: float,
    trackers: TrackerSet,
    keep_checkpoints: bool,
    replaced: Path | None = None,
) -> dict[str, Any]:
    """Claim the run folder and train, showing the progress. Return the content of result.json.

    `replaced` is a file of an earlier run to delete, as it would keep the same command without --force from resuming.
    """
    from kdfast.distillation.folder import RunFolder
    from kdfast.distillation.train import Monitoring, train
    from kdfast.trackers import TrackerSet

    with (
        progress(label) as report,
        plan.distributed.process_group(plan.device),
        RunFolder(out, plan.identity, metadata=plan.metadata, resume=resume, writes=plan.distributed.is_main) as folder,
    ):
        if replaced is not None and plan.distributed.is_main:
            replaced.unlink(missing_ok=True)
        finished = folder.read_result() if plan.distributed.is_main else None
        trains = plan.distributed.is_main and finished is None
        if trains and not folder.has_checkpoint:
            recipe.announce_views(plan.source, plan.metadata["augment"])
            recipe.announce_loader(plan.loader, plan.source.train, plan.device)
            recipe.announce_unused(plan.config, plan.metadata.get("cache"), plan.metadata.get("teacher"))
        chosen = trackers if trains else TrackerSet([])
        with chosen.started(out, plan.identity) as started:
            if MODE.log_json and plan.distributed.is_main:
                started.append(JsonLines())
            monitoring = Monitoring(
                log_every=log_every,
                eval_every=eval_every,
                checkpoint_seconds=checkpoint_seconds,
                trackers=started,
                progress=report,
                say=report.say,
                keep_checkpoints=keep_checkpoints,
            )
            return train(plan, folder, monitoring)


def load_trackers(names: list[str] | None, tensorboard: bool) -> TrackerSet:
    """Return the trackers of the options --track and --tensorboard.

    Raises:
        UsageError: There is no such tracker, or its package is missing.
    """
    from kdfast.trackers import TrackerSet

    return TrackerSet([*(names or []), *(["tensorboard"] if tensorboard else [])])


class JsonLines:
    """A tracker that writes the metrics as lines of --log-json."""

    identifier: str | None = None

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""
        log_event("metrics", step=step, **values)

    def close(self, *, failed: bool) -> None:
        """Do nothing: every line is written at once."""


def length(context: typer.Context, epochs: int | None, steps: int | None) -> dict[str, Any]:
    """Return the length of a run, as a field of `RunConfig`: the epochs or the steps.

    The command line takes precedence over --config.

    Raises:
        UsageError: Both are given in the same place.
    """
    if epochs is not None and steps is not None:
        typed = [name for name in ("epochs", "steps") if options.is_typed(context, name)]
        if len(typed) != 1:
            raise UsageError("`epochs` and `steps` both say how long to train: pass one of them")
        epochs, steps = (epochs, None) if typed == ["epochs"] else (None, steps)
    if steps is not None:
        return {"steps": steps}
    return {"epochs": DEFAULT_EPOCHS if epochs is None else epochs}


def resume_mode(resume: str, force: bool) -> str:
    """Return what a run does about an earlier one in its folder, a value of `RunFolder`.

    Raises:
        UsageError: The options exclude each other.
    """
    if force and resume == "never":
        raise UsageError("--force and --resume never exclude each other: pass one of them")
    return "overwrite" if force else resume


def refuse_existing(out: Path, *, force: bool = False) -> None:
    """Check, before the work, that a model file can be written, and that it does not exist or may be replaced.

    Args:
        out: The file.
        force: Whether a model of kdfast may be replaced.

    Raises:
        OutputError: The file exists and may not be replaced, or its folder cannot be written.
    """
    from kdfast.files import check_replaceable, check_writable

    if force:
        check_replaceable(out, _is_model)
    elif os.path.lexists(out):
        raise OutputError(f"{out} exists; choose another --out, or replace it with --force")
    check_writable(out.parent)


def _is_model(path: Path) -> bool:
    from kdfast.errors import CheckpointError
    from kdfast.nets.checkpoint import is_own_checkpoint
    from kdfast.nets.foreign import read_torch_file

    try:
        return is_own_checkpoint(read_torch_file(path, advice=""))
    except CheckpointError:
        return False


def check_trained_model(out: Path, folder: Path) -> None:
    """Check, before the work, that a model file may be written: there is none, or it is that of the finished run.

    Args:
        out: The model file.
        folder: The run folder.

    Raises:
        OutputError: The file exists and holds anything but the run's result, or its folder cannot be written.
        CheckpointError: The run is finished, and its own student is damaged.
    """
    from kdfast.distillation.folder import read_finished_run, read_result
    from kdfast.errors import CheckpointError
    from kdfast.nets.checkpoint import load_model

    result = read_result(folder)
    if not os.path.lexists(out) or result is None:
        refuse_existing(out)
        return
    read_finished_run(folder)
    try:
        same = load_model(out).digest == result["weights"]
    except CheckpointError:
        same = False
    if not same:
        raise OutputError(
            f"{out} exists and is not the result of {folder}; choose another --out, or replace it with --force"
        )


def summary(result: dict[str, Any], out: Path) -> str:
    """Summarize a finished run in two lines."""
    teacher = (
        f"alpha {result['alpha']:g}"
        if result["targets"] is None
        else (f"alpha {result['alpha']:g}, targets from {result['targets']}, {result['views']} views")
    )
    return (
        f"top-1 {result['test_top1']:.2f}  top-5 {result['test_top5']:.2f}  on the test split "
        f"({result['kept']} samples kept, {teacher})\n"
        f"{result['steps']} steps, {result['images']} images in {result['seconds']:.1f} s "
        f"({result['images_per_second']:.0f} images/s, {result['loader']} loader); written to {out}"
    )
