"""`kdfast plan`: how long each stage takes on this machine, what it writes, and what pruning saves."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from kdfast.cli import options
from kdfast.cli.commands import recipe, training
from kdfast.cli.output import show
from kdfast.cli.progress import format_seconds

if TYPE_CHECKING:
    from kdfast.planning.request import Amounts


def plan(
    context: typer.Context,
    data: options.Data,
    student: options.Student,
    fraction: Annotated[
        float, typer.Option("--fraction", help="Share of the training split to keep.", metavar="NUMBER")
    ],
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Teacher, T.pt; not needed with --alpha 0 and no such method.")
    ] = None,
    teacher_net: options.TeacherNet = None,
    net_arg: options.NetArg = None,
    method: Annotated[
        str | None, typer.Option("--method", help="Method of `kdfast prune`; default: random.", metavar="NAME")
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option("--rule", help="Rule of `kdfast prune`; default: the one published with it.", metavar="NAME"),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", help="Option of the rule or the method; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    score_option: Annotated[
        list[str] | None,
        typer.Option("--score-option", help="Option of the score; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    dynamics_net: Annotated[
        str | None,
        typer.Option(
            "--dynamics-net",
            help="Network of `kdfast dynamics`, for methods that need a recording; default: the student.",
            metavar="NAME",
        ),
    ] = None,
    dynamics_epochs: Annotated[int, typer.Option("--dynamics-epochs", help="Epochs of that recording.", min=1)] = 30,
    dynamics_runs: Annotated[int, typer.Option("--dynamics-runs", help="Runs of that recording.", min=1)] = 1,
    epochs: training.RunEpochs = None,
    steps: training.Steps = None,
    batch_size: training.BatchSize = 64,
    optimizer: recipe.Optimizer = "sgd",
    ema: recipe.Ema = 0.0,
    clip: recipe.Clip = 0.0,
    augment: recipe.Augment = None,
    mixup: recipe.Mixup = 0.0,
    cutmix: recipe.CutMix = 0.0,
    alpha: training.Alpha = "auto",
    ce_weight: training.CeWeight = None,
    kd_term: training.KdTerm = None,
    tap: training.Tap = None,
    initial_epochs: training.InitialEpochs = None,
    views: training.Views = 0,
    online: Annotated[
        bool, typer.Option("--online", help="Run the teacher during training; default where a term needs that.")
    ] = False,
    whole_cache: Annotated[
        bool,
        typer.Option("--whole-cache", help="Cache all samples, for any later subset; default: those that are kept."),
    ] = False,
    top_k: Annotated[
        int | None,
        typer.Option("--top-k", help="Classes that the cache keeps, 0: all; default: that of `kdfast cache`.", min=0),
    ] = None,
    kind: Annotated[
        str, typer.Option("--kind", help="What the cache holds, as for `kdfast cache`.", metavar="logits|features")
    ] = "logits",
    dtype: Annotated[
        str, typer.Option("--dtype", help="Type of the cached logits.", metavar="float16|float32")
    ] = "float16",
    cache_precision: Annotated[
        str,
        typer.Option(
            "--cache-precision",
            help="Arithmetic of the teacher, as --precision of `kdfast cache`.",
            metavar="auto|fp32|bf16",
            callback=options.parse_cache_precision,
        ),
    ] = "fp32",
    precision: options.Precision = "fp32",
    loader: options.Loader = "auto",
    compile_network: training.Compile = False,
    cuda_graph: training.CudaGraph = True,
    students: Annotated[int, typer.Option("--students", help="Students to train on the subset.", min=1)] = 1,
    jobs: Annotated[
        int, typer.Option("--jobs", help="Students that train at a time, with a share of the CPU's threads.", min=1)
    ] = 1,
    calibrate_seconds: Annotated[
        float,
        typer.Option(
            "--calibrate-seconds",
            help="Seconds of the measurements, about; longer ones are more precise.",
            min=0.1,
            max=3600,
        ),
    ] = 15.0,
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    seed: options.Seed = 0,
    device: options.Device = "auto",
    config: options.Config = None,
) -> None:
    """Say how long each stage takes on this machine and what it writes, and what pruning saves; keep nothing.

    Measures the teacher, the student and the selection on a part of the data. The stages are those of `kdfast
    dynamics`, `cache`, `score`, `prune` and `distill`, compared with distilling on all samples.
    """
    import time

    from kdfast.data.augment.presets import augment_source
    from kdfast.data.readers.registry import open_source
    from kdfast.device import resolve_device
    from kdfast.distillation.config import Execution, RunConfig
    from kdfast.distillation.losses.alpha import parse_alpha
    from kdfast.distillation.losses.settings import parse_taps, parse_terms
    from kdfast.nets.checkpoint import load_model
    from kdfast.planning.plan import make_plan
    from kdfast.planning.request import CacheSettings, PlanRequest, choose_classes, recording_for
    from kdfast.planning.table import render_plan
    from kdfast.pruning.options import parse_options
    from kdfast.pruning.request import PruneRequest

    options.one_of("--dtype", dtype, ("float16", "float32"))
    options.one_of("--kind", kind, ("logits", "features"))
    place = resolve_device(device)
    settings = RunConfig(
        student=options.with_arguments(student, net_arg),
        **training.length(context, epochs, steps),
        batch_size=batch_size,
        alpha=parse_alpha(alpha, fraction, 1.0 if ce_weight is None else float("inf")),
        precision=options.choose_precision(precision, place),
        seed=seed,
        ce=ce_weight,
        terms=parse_terms(kd_term or [], []),
        taps=parse_taps(tap or []),
        initial_epochs=initial_epochs,
        optimizer=optimizer,
        ema=ema,
        clip=clip,
        mixup=mixup,
        cutmix=cutmix,
    )
    selection = PruneRequest(
        fractions=(fraction,),
        method=method,
        rule=rule,
        options=parse_options(option or []),
        score_options=parse_options(score_option or []),
        seed=seed,
        device=str(place),
        teacher=teacher,
    )
    model = None if teacher is None else load_model(teacher)
    started = time.perf_counter()
    source, views = augment_source(open_source(data, size=size, order=order, split=split), augment, views)
    opening = time.perf_counter() - started
    request = PlanRequest(
        fraction=fraction,
        config=dataclasses.replace(settings, views=views),
        selection=selection,
        cache=CacheSettings(
            dtype=cast(Any, dtype),
            top_k=choose_classes(top_k, source, kind),
            kind=cast(Any, kind),
            precision=cast(Any, options.CACHE_PRECISIONS[options.choose_precision(cache_precision, place)]),
            whole=whole_cache,
        ),
        online=online,
        recorded=RunConfig(dynamics_net or settings.student, epochs=dynamics_epochs, batch_size=batch_size),
        recording=recording_for(selection, dynamics_runs, len(source.classes)),
        loader=loader,
        execution=Execution(compile_network, cuda_graph),
        students=students,
        jobs=jobs,
        device=place,
        seconds=calibrate_seconds,
    )
    found = make_plan(request, source, model, opening=opening)
    caching, recording = (top_k, kind, dtype, cache_precision), (dynamics_net, dynamics_epochs, dynamics_runs)
    _announce_unused(found.amounts, whole_cache, caching, recording)
    show(render_plan(found, format_seconds), found.to_dict())


# Options of one stage, and their defaults.
_CACHING = {"--top-k": None, "--kind": "logits", "--dtype": "float16", "--cache-precision": "fp32"}
_RECORDING = {"--dynamics-net": None, "--dynamics-epochs": 30, "--dynamics-runs": 1}


def _announce_unused(amounts: Amounts, whole: bool, caching: Sequence[object], recording: Sequence[object]) -> None:
    """Say on stderr which options have no effect on a plan, given the values of those in the tables above."""

    def changed(defaults: Mapping[str, object], values: Sequence[object]) -> dict[str, bool]:
        return {flag: value != defaults[flag] for flag, value in zip(defaults, values, strict=True)}

    if not amounts.views:
        recipe.announce_no_effect({"--whole-cache": whole}, "the students read no cache")
    if not (amounts.views or amounts.scored_views):
        recipe.announce_no_effect(changed(_CACHING, caching), "no stage makes a cache")
    if not amounts.recorded_epochs:
        recipe.announce_no_effect(changed(_RECORDING, recording), "the selection needs no dynamics")
