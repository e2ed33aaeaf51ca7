"""`kdfast dynamics`: train networks and record what they say of every sample on the way."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kdfast.cli import options, training
from kdfast.cli.progress import progress


def dynamics(
    data: options.Data,
    net: Annotated[str, typer.Option("--net", help="Network, such as resnet8; torchvision:NAME or timm:NAME.")],
    out: Annotated[Path, typer.Option("--out", help="The folder of the dynamics; the same command resumes it.")],
    epochs: training.Epochs = 30,
    runs: Annotated[int, typer.Option("--runs", help="Training runs; run r has the seed plus r.", min=1)] = 1,
    only: Annotated[
        int | None,
        typer.Option("--only", help="Train this run alone, from 0: processes or machines can share the runs.", min=0),
    ] = None,
    keep: Annotated[
        float,
        typer.Option(
            "--keep", help="Share of the samples that a run trains on; 0.7 for memorization. All are recorded."
        ),
    ] = 1.0,
    record_every: Annotated[
        int, typer.Option("--record-every", help="Record every so many epochs; all counts of epochs are then of those.")
    ] = 1,
    features_every: Annotated[
        int,
        typer.Option("--features-every", help="Keep features every so many recorded epochs; 0: after the last alone."),
    ] = 0,
    batch_size: training.BatchSize = 64,
    lr: training.Lr = 0.05,
    momentum: training.Momentum = 0.9,
    weight_decay: training.WeightDecay = 5e-4,
    schedule: training.Schedule = "step",
    warmup_epochs: training.Warmup = 0.0,
    views: training.Views = 0,
    precision: training.Precision = "fp32",
    loader: options.Loader = "auto",
    size: options.Size = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    checkpoint_seconds: training.CheckpointSeconds = 30.0,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Train a network (several times) and record after every epoch what it says of every training sample as it is.

    Those dynamics are what forgetting, el2n, grand, dual, aum and ccs are computed from; with --keep, memorization.
    """
    from kdfast.data.loaders import make_loader
    from kdfast.data.readers.registry import normalization_of, open_source
    from kdfast.device import resolve_device
    from kdfast.distill.config import RunConfig
    from kdfast.distill.plan import Opened
    from kdfast.distill.record_dynamics import Recording, record
    from kdfast.distill.teacher_targets import TeacherSide

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
        precision=precision,
        seed=seed,
    )
    recording = Recording(runs=runs, only=only, keep=keep, record_every=record_every, features_every=features_every)
    place = resolve_device(device)
    source = open_source(data, size=size)
    if dry_run:
        bits = len(source.train) * (epochs // record_every) * runs * (3 * 16 + 1)
        print(f"would train {net} {runs} times for {epochs} epochs and write {bits / 8e6:.1f} MB and features to {out}")
        return
    opened = Opened(source, make_loader(source.train, loader, place), normalization_of(source.train), TeacherSide())
    with progress(f"dynamics {net}") as report:
        results = record(
            opened, settings, recording, out, device=place, checkpoint_seconds=checkpoint_seconds, advance=report
        )
    mean = sum(result["test_top1"] for result in results) / len(results)
    print(
        f"recorded {len(results)} run{'s' * (len(results) > 1)} of {epochs // record_every} epochs on "
        f"{len(source.train)} samples; mean test top-1 {mean:.2f}; written to {out}"
    )
