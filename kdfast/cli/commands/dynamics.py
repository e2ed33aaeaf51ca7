"""`kdfast dynamics`: train networks and record their outputs for every sample after each epoch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdfast.cli import options
from kdfast.cli.commands import recipe, training
from kdfast.cli.output import show
from kdfast.cli.progress import announce, format_seconds, progress

if TYPE_CHECKING:
    import torch

    from kdfast.data.source import Source
    from kdfast.distillation.config import RunConfig
    from kdfast.distillation.record_dynamics import RecordingConfig


def dynamics(
    data: options.Data,
    net: options.Net,
    out: Annotated[Path, typer.Option("--out", help="Folder of the recording; the same command resumes it.")],
    net_arg: options.NetArg = None,
    init: options.Init = None,
    epochs: training.Epochs = 30,
    runs: Annotated[int, typer.Option("--runs", help="Training runs; run r uses seed + r.", min=1)] = 1,
    only: Annotated[
        int | None,
        typer.Option(
            "--only",
            help="Train only this run, counted from 0, so that processes or machines can share the runs.",
            min=0,
        ),
    ] = None,
    keep: Annotated[
        float,
        typer.Option(
            "--keep",
            help="Share of the samples that each run trains on, in (0, 1]; 0.7 for memorization. All are recorded.",
        ),
    ] = 1.0,
    record_every: Annotated[
        int, typer.Option("--record-every", help="Epochs between two recordings; scores then count recorded epochs.")
    ] = 1,
    features_every: Annotated[
        int,
        typer.Option("--features-every", help="Recorded epochs between two copies of the features; 0: only the last."),
    ] = 0,
    top_k: Annotated[
        int,
        typer.Option(
            "--top-k",
            help="Classes to keep of each prediction, the most probable ones with their probabilities, as tdds needs "
            "them; the number of classes keeps all, 0 none.",
        ),
    ] = 0,
    record: Annotated[
        str,
        typer.Option(
            "--record",
            help="When correctness is recorded, for forgetting: after each epoch, or also in its training batches, as "
            "they are augmented and before their steps.",
            metavar="epoch|batch",
        ),
    ] = "epoch",
    batch_size: training.BatchSize = 64,
    lr: training.Lr = 0.05,
    momentum: training.Momentum = 0.9,
    weight_decay: training.WeightDecay = 5e-4,
    schedule: training.Schedule = "step",
    warmup_epochs: training.Warmup = 0.0,
    optimizer: recipe.Optimizer = "sgd",
    label_smoothing: recipe.LabelSmoothing = 0.0,
    clip: recipe.Clip = 0.0,
    augment: recipe.Augment = None,
    views: training.Views = 0,
    precision: options.Precision = "fp32",
    loader: options.Loader = "auto",
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    checkpoint_seconds: training.CheckpointSeconds = 30.0,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    write_config: options.WriteConfig = None,
) -> None:
    """Train one network per run and record its outputs for every unaugmented training sample after each epoch.

    The recording is the input of the scores that `kdfast score --help` lists with --dynamics. Of these, memorization
    needs --keep, and tdds on many classes --top-k.
    """
    from kdfast.data.augment.presets import augment_source
    from kdfast.data.loaders import make_loader
    from kdfast.data.readers.registry import open_source
    from kdfast.data.source import compute_normalization
    from kdfast.device import resolve_device
    from kdfast.distillation.config import RunConfig
    from kdfast.distillation.inputs import check_student
    from kdfast.distillation.plan import LoadedInputs
    from kdfast.distillation.record_dynamics import RecordingConfig, check_recording, record_dynamics
    from kdfast.distillation.targets import TeacherTargets
    from kdfast.distributed.group import Distributed
    from kdfast.dynamics.plan import check_dynamics_folder, delete_dynamics

    distributed = Distributed.from_environment()
    place = distributed.local_device(resolve_device(device))
    check_dynamics_folder(out)
    source, views = augment_source(open_source(data, size=size, order=order, split=split), augment, views)
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
        clip=clip,
    )
    recording = RecordingConfig(
        runs=runs,
        only=only,
        keep=keep,
        record_every=record_every,
        features_every=features_every,
        top_k=top_k,
        record=record,
    )
    check_student(settings, len(source.train), source, place)
    check_recording(settings, recording, source, distributed)
    size_bytes, seconds = _estimate(settings, recording, source, place) if distributed.is_main else (0, None)
    seconds = None if seconds is None else seconds / distributed.world_size
    announce(out, size_bytes, seconds)
    if dry_run:
        show(
            f"would train {net} {runs} times for {epochs} epochs and write {size_bytes / 1e6:.1f} MB to {out}"
            f"{'' if seconds is None else f', in about {format_seconds(seconds)}'}",
            {"dry_run": True, "runs": runs, "epochs": epochs, "bytes": size_bytes, "seconds": seconds},
        )
        return
    recipe.announce_views(source, augment)
    inputs = LoadedInputs(
        source, make_loader(source.train, loader, place), compute_normalization(source.train), TeacherTargets()
    )
    with progress(f"dynamics {net}") as report, distributed.process_group(place):
        if force and distributed.is_main:
            delete_dynamics(out)
        results = record_dynamics(
            inputs,
            settings,
            recording,
            out,
            device=place,
            distributed=distributed,
            checkpoint_seconds=checkpoint_seconds,
            progress=report,
        )
    if distributed.is_main:
        _show_recorded([result["test_top1"] for result in results], epochs // record_every, len(source.train), out)


def _show_recorded(accuracies: list[float], epochs: int, samples: int, out: Path) -> None:
    runs, mean = len(accuracies), sum(accuracies) / len(accuracies)
    show(
        f"recorded {runs} run{'s' * (runs > 1)} of {epochs} epochs on {samples} samples; mean test top-1 {mean:.2f}; "
        f"written to {out}",
        {"runs": runs, "epochs": epochs, "samples": samples, "test_top1": accuracies, "out": str(out)},
    )


def _estimate(
    settings: RunConfig, recording: RecordingConfig, source: Source, device: torch.device
) -> tuple[int, float | None]:
    """Return the bytes that all runs will write, and the seconds that those of this command take, if they are many."""
    from kdfast.dynamics.format import bits_per_sample
    from kdfast.estimates import estimate_training, recorded_bytes

    samples, epochs = len(source.train), settings.epochs // recording.record_every
    with_features = -(-epochs // recording.features_every) if recording.features_every else 1
    size = recorded_bytes(
        settings.student,
        source,
        bits=bits_per_sample(recording.top_k, len(source.classes), recording.record) * epochs * recording.runs,
        feature_epochs=with_features * recording.runs,
    )
    runs = len(recording.selected_runs)
    seconds = estimate_training(
        settings.student,
        source,
        device,
        precision=settings.precision,
        steps=-(-int(samples * recording.keep) // settings.batch_size) * settings.epochs * runs,
        batch_size=settings.batch_size,
        forwards=samples * epochs * runs,
    )
    return size, seconds
