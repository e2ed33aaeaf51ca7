"""`kdfast sweep`: methods x fractions x with and without the teacher x seeds, in one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kdfast.cli import options
from kdfast.cli.commands import recipe, training
from kdfast.cli.commands.results import engine as engines
from kdfast.cli.output import note, show
from kdfast.cli.progress import progress
from kdfast.errors import UsageError
from kdfast.text import counted

if TYPE_CHECKING:
    from kdfast.sweep.session import Session

Number = TypeVar("Number", int, float)


def sweep(
    out: Annotated[Path, typer.Option("--out", help="Folder of the sweep; the same command resumes it.")],
    data: options.OptionalData = None,
    student: Annotated[str | None, typer.Option("--student", help=options.NETWORK, metavar="NAME")] = None,
    net_arg: options.NetArg = None,
    init: options.Init = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Comma-separated: SCORE (with the rule it was published with), SCORE/RULE, RULE, or a method that "
            "selects the subset directly; options follow as NAME:a=2,b=3. Examples: "
            "random,el2n or influence:kind=self/beta:a=2,b=3. `kdfast prune --help` lists the names.",
            metavar="LIST",
        ),
    ] = "random",
    fractions: Annotated[
        str, typer.Option("--fractions", help="Comma-separated shares of the training split to keep.", metavar="LIST")
    ] = "0.1,0.3,0.5",
    kd: Annotated[
        str, typer.Option("--kd", help="Train with the teacher (on), without it (off), or both.", metavar="on|off|both")
    ] = "both",
    seeds: Annotated[
        str, typer.Option("--seeds", help="Comma-separated seeds; each draws a subset and a student.", metavar="LIST")
    ] = "0",
    steps: Annotated[
        int, typer.Option("--steps", help="Steps of every run; the last epoch may end early.", min=1)
    ] = 1250,
    cache: Annotated[
        str | None,
        typer.Option("--cache", help="Teacher's cache of all training samples.", metavar=options.PATH),
    ] = None,
    dynamics: Annotated[
        str | None, typer.Option("--dynamics", help="Folder written by `kdfast dynamics`.", metavar=options.PATH)
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option(
            "--scores",
            help="Make the scores of FILE available to --methods as NAME; repeatable.",
            metavar="NAME=FILE",
        ),
    ] = None,
    key: Annotated[
        list[str] | None, typer.Option("--key", help=f"{options.KEY_HELP}; repeatable.", metavar="NAME=KEY")
    ] = None,
    higher: Annotated[
        list[str] | None,
        typer.Option("--higher", help=f"{options.HIGHER_HELP}; repeatable.", metavar="NAME=hard|easy"),
    ] = None,
    batch_size: training.BatchSize = 64,
    lr: training.Lr = 0.05,
    momentum: training.Momentum = 0.9,
    weight_decay: training.WeightDecay = 5e-4,
    schedule: training.Schedule = "cosine",
    warmup_epochs: training.Warmup = 0.0,
    optimizer: recipe.Optimizer = "sgd",
    label_smoothing: recipe.LabelSmoothing = 0.0,
    ema: recipe.Ema = 0.0,
    clip: recipe.Clip = 0.0,
    augment: recipe.Augment = None,
    mixup: recipe.Mixup = 0.0,
    cutmix: recipe.CutMix = 0.0,
    alpha: Annotated[
        str,
        typer.Option(
            "--alpha",
            help="Weight of the teacher's term in the runs with the teacher, above 0 and at most 1; auto: as for "
            "`kdfast distill`.",
            metavar="NUMBER|auto",
        ),
    ] = "auto",
    temperature: training.Temperature = 4.0,
    ce_weight: training.CeWeight = None,
    kd_term: training.KdTerm = None,
    kd_weight: training.KdWeight = None,
    kd_preset: training.KdPreset = "paper",
    kd_warmup_epochs: training.KdWarmup = 0.0,
    views: training.Views = 0,
    view_seed: training.ViewSeed = None,
    precision: options.Precision = "fp32",
    loader: options.Loader = "auto",
    size: options.Size = None,
    order: options.Order = "path",
    split: options.Split = None,
    device: options.Device = "auto",
    jobs: engines.Jobs = "1",
    engine: engines.Engine = "local",
    ray_address: engines.RayAddress = None,
    cpus_per_job: engines.CpusPerJob = None,
    gpus_per_job: engines.GpusPerJob = None,
    slurm_option: engines.SlurmOption = None,
    keep_runs: Annotated[
        bool,
        typer.Option(
            "--keep-runs",
            help="Keep the folder of every run, with its student; default: delete it when the run is finished.",
        ),
    ] = False,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report-only", help="Only write the table, the plot and the page again; needs no option but --out."
        ),
    ] = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    write_config: options.WriteConfig = None,
) -> None:
    """Train a student for each method, fraction and seed, with and without the teacher, and compare them in one table.

    Each finished run appends a row to results.jsonl and is not run again; several of these commands at once share the
    work. table.md, plot.png and report.html are made from the rows.
    """
    from kdfast.sweep.report import check_report_files, report_sweep
    from kdfast.sweep.results_log import ResultsLog

    ResultsLog(out).check_folder()
    check_report_files(out)
    if not report_only:
        from kdfast.sweep.grid import KD_CHOICES, SweepConfig
        from kdfast.sweep.run import run_sweep
        from kdfast.sweep.session import Session
        from kdfast.sweep.spec import parse_methods

        chosen = engines.parse_engine(engine, device, ray_address, cpus_per_job, gpus_per_job, slurm_option)
        at_a_time = engines.parse_jobs(jobs, chosen)
        if data is None or student is None:
            raise UsageError("a sweep needs --data and --student: pass both, or --report-only")
        settings = {
            "student": options.with_arguments(student, net_arg),
            **({} if init is None else {"init": init}),
            "batch_size": batch_size,
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "schedule": schedule,
            "warmup_epochs": warmup_epochs,
            "temperature": temperature,
            "views": views,
            "view_seed": view_seed,
            "precision": engines.choose_precision(precision, chosen),
            **recipe.changed(
                optimizer=optimizer, label_smoothing=label_smoothing, ema=ema, clip=clip, mixup=mixup, cutmix=cutmix
            ),
        }
        loss = _loss(ce_weight, kd_term, kd_weight, kd_preset, kd_warmup_epochs)
        engines.prepare(chosen, dry_run)
        session = Session(
            SweepConfig(
                data=data,
                methods=parse_methods(methods),
                fractions=_parse_numbers("--fractions", fractions, float),
                kd=KD_CHOICES[options.one_of("--kd", kd, KD_CHOICES)],
                seeds=_parse_numbers("--seeds", seeds, int),
                steps=steps,
                settings=settings,
                alpha=alpha,
                loss=loss,
                cache=cache,
                dynamics=dynamics,
                scores=_parse_pairs("--scores", "NAME=FILE", scores),
                key=_parse_pairs("--key", "NAME=KEY", key),
                higher=_parse_pairs("--higher", "NAME=hard or NAME=easy", higher),
                loader=loader,
                size=size,
                order=order,
                split=split,
                augment=augment,
                device=chosen.device_here,
            )
        )
        for how in session.describe_scores():
            note(how)
        if dry_run:
            show(*_plan(session, out))
            return
        recipe.announce_views(session.source, augment)
        with progress("sweep") as report:
            follow: dict[str, Any] = {"keep_runs": keep_runs, "on_row": _print_row, "progress": report}
            run_sweep(session, out, engine=chosen, jobs=at_a_time, **follow)
    table = report_sweep(out)
    show(
        f"\n{table}\ntable.md, plot.png and report.html written to {out}",
        {"out": str(out), "rows": ResultsLog(out).results()},
    )


def _loss(
    ce: float | None, terms: list[str] | None, weights: list[float] | None, preset: str, warmup_epochs: float
) -> dict[str, Any]:
    from kdfast.distillation.losses.settings import parse_terms

    return {"ce": ce, "terms": parse_terms(terms or [], weights or [], preset), "terms_warmup_epochs": warmup_epochs}


def _print_row(row: dict[str, Any]) -> None:
    note(
        f"{row['method']} f={row['fraction']:g} {'KD' if row['kd'] else 'plain'} seed {row['seed']}: "
        f"top-1 {row['test_top1']:.2f} ({row['steps']} steps, {row['seconds']:.1f} s)"
    )


def _plan(session: Session, out: Path) -> tuple[str, dict[str, Any]]:
    from kdfast.sweep.results_log import ResultsLog

    done, lines, rows = ResultsLog(out).done(), [], []
    for run in session.runs():
        samples = session.count_samples(run.fraction)
        config = session.config.run_config(samples, seed=run.seed)
        length = f"{samples} samples, {session.config.steps} steps in {counted(config.epochs, 'epoch')}"
        lines.append(f"{run}: {'done' if run.key in done else 'to run'}, {length}")
        epochs = config.epochs if config.steps is None else None
        numbers = {"samples": samples, "steps": session.config.steps, "epochs": epochs}
        rows.append({"run": str(run), "done": run.key in done, **numbers})
    pending = sum(not row["done"] for row in rows)
    text = "\n".join([*lines, f"would run {pending} of {len(lines)} rows"])
    return text, {"dry_run": True, "to_run": pending, "rows": rows}


def _parse_numbers(flag: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError as error:
        raise UsageError(f"{flag} is {text!r}: pass numbers separated by commas") from error


def _parse_pairs(flag: str, form: str, texts: list[str] | None) -> dict[str, str]:
    pairs = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{flag} is {text!r}: pass {form}")
        pairs[name] = value
    return pairs
