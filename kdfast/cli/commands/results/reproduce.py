"""`kdfast reproduce`: figures and tables of papers, run as published and held against the published values."""

from __future__ import annotations

import functools
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdfast.cli import options
from kdfast.cli.commands.results import engine as engines
from kdfast.cli.commands.results.study_output import (
    THEOREM,
    describe_plan,
    print_row,
    report_again,
    show_left,
    show_list,
    write_reports,
)
from kdfast.cli.output import note, show
from kdfast.cli.progress import progress
from kdfast.errors import UsageError, unknown_name

if TYPE_CHECKING:
    from kdfast.reproduction.engine.session import ReproductionSession
    from kdfast.sweep.parallel.engine import EngineConfig
    from kdfast.sweep.results_log import ResultsLog

# Options that the theorem takes, and those that belong to every command which adds runs to the same results.
_OF_THE_THEOREM = {"study", "out", "dry_run", "config", "write_config"}
_OF_RUNS = (
    "data", "out", "teachers", "mean", "std", "dynamics", "seeds", "dataset", "precision", "loader", "size", "order",
    "split", "device",
)  # fmt: skip

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def reproduce(
    context: typer.Context,
    study: Annotated[
        str | None,
        typer.Argument(
            help="Name of a study, as --list prints them; a study file of your own, FILE.yaml; or theorem, which needs "
            "no data.",
            metavar="STUDY",
        ),
    ] = None,
    list_studies: Annotated[
        bool, typer.Option("--list", help="Print the studies, their cells and the images of one seed, and exit.")
    ] = False,
    data: options.OptionalData = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            help="Folder of all files; the same command resumes, and several studies and machines may share it.",
        ),
    ] = None,
    teachers: Annotated[
        list[str] | None,
        typer.Option(
            "--teacher",
            help="A trained teacher of the network NAME, a file of kdfast or any checkpoint; repeatable. Others are "
            "trained with the study's recipe.",
            metavar="NAME=FILE",
        ),
    ] = None,
    mean: Annotated[
        str | None,
        typer.Option(
            "--mean", help="Channel means the checkpoints were trained with, a,b,c, where the file lacks them."
        ),
    ] = None,
    std: Annotated[
        str | None, typer.Option("--std", help="Channel standard deviations, a,b,c on the same scale.")
    ] = None,
    dynamics: Annotated[
        str | None,
        typer.Option(
            "--dynamics",
            help="Folder written by `kdfast dynamics`, for scores; default: recorded as the study says.",
            metavar=options.PATH,
        ),
    ] = None,
    fractions: Annotated[
        str | None,
        typer.Option(
            "--fractions", help="Only these kept shares, comma-separated; runs on all data stay.", metavar="LIST"
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option("--methods", help="Only these methods, comma-separated; runs on all data stay.", metavar="LIST"),
    ] = None,
    restrict: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Only cells with one of these values of an axis; repeatable.", metavar="AXIS=VALUE,..."
        ),
    ] = None,
    seeds: Annotated[
        str, typer.Option("--seeds", help="Number of seeds, or comma-separated seeds.", metavar="N|LIST")
    ] = "1",
    epochs: Annotated[
        int | None,
        typer.Option(
            "--epochs",
            help="Shorten the schedules of students and teachers: epochs in place of those of the study's recipe. The "
            "rows are then marked, and published values are not subtracted.",
            min=1,
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset", help="Name of the data in the study's published values; default: recognized.", metavar="NAME"
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Begin no run that would end later than this from now, by the speed of this machine.",
            metavar="90m|3h|2d",
        ),
    ] = None,
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
            help="Keep the folder of every run, with its student, and its cache; default: delete them when no run "
            "needs them.",
        ),
    ] = False,
    teachers_only: Annotated[
        bool, typer.Option("--teachers-only", help="Only make the teachers of these cells, one after another.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Only write the table and the page again, from the rows in --out.")
    ] = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
    write_config: options.WriteConfig = None,
) -> None:
    """Run a figure or table of a paper as published, and show ours beside the published values.

    Teachers, recorded dynamics, subsets and caches are made when a run needs them. Each finished run appends a row to
    results.jsonl and is not run again; several of these commands at once share the work.
    """
    if list_studies:
        show_list()
        return
    if study is None or out is None:
        raise UsageError("pass a study and --out, or --list")
    if study == THEOREM:
        if others := sorted(_given(context).keys() - _OF_THE_THEOREM):
            raise UsageError(f"the theorem takes no `{others[0]}`: omit it")
        _reproduce_theorem(out, dry_run=dry_run)
        return
    from kdfast.files import schemas
    from kdfast.reproduction.report.page import check_report_files
    from kdfast.reproduction.selection import check_epochs, parse_restrictions, parse_values, select_cells
    from kdfast.reproduction.study_file import load_study
    from kdfast.reproduction.table import check_table
    from kdfast.sweep.results_log import ResultsLog

    loaded = load_study(study)
    cells = select_cells(
        loaded,
        parse_restrictions(restrict or []),
        fractions=None if fractions is None else [float(str(f)) for f in parse_values("fraction", fractions)],
        methods=None if methods is None else [str(name) for name in parse_values("method", methods)],
    )
    known = {**loaded.published, **loaded.teacher_top1}
    if dataset is not None and known and dataset not in known:
        raise unknown_name(f"`dataset`: {loaded.name} has no published value for", dataset, known)
    seconds = None if budget is None else _parse_budget(budget, engine)
    numbers = _parse_seeds(seeds)
    log = ResultsLog(out, schemas.StudyRow, "study")
    log.check_folder()
    check_table(out)
    check_report_files(out)
    command = _same_command(context, loaded.argument)
    if report_only:
        report_again(loaded, log, dataset=dataset, command=command)
        return
    if data is None:
        raise UsageError("pass --data, or --report-only")
    from kdfast.reproduction.engine.config import ReproductionConfig
    from kdfast.reproduction.engine.session import ReproductionSession

    chosen = engines.parse_engine(engine, device, ray_address, cpus_per_job, gpus_per_job, slurm_option)
    at_a_time = engines.parse_jobs(jobs, chosen)
    precision = engines.choose_precision(precision, chosen)
    engines.prepare(chosen, dry_run)
    session = ReproductionSession(
        ReproductionConfig(
            study=loaded,
            cells=tuple(cells),
            seeds=numbers,
            data=data,
            out=out,
            dataset=dataset,
            epochs=None if epochs is None else check_epochs(loaded, epochs),
            teachers=_parse_teachers(teachers or []),
            normalization=options.parse_normalization(mean, std),
            dynamics=dynamics,
            precision=precision,
            loader=loader,
            size=size,
            order=order,
            split=split,
            device=chosen.device_here,
        )
    )
    if dry_run:
        show(*describe_plan(session, log))
        return
    if teachers_only:
        _make_teachers(session, log)
        return
    _run(session, log, chosen, command, jobs=at_a_time, keep_runs=keep_runs, seconds=seconds)


def _make_teachers(session: ReproductionSession, log: ResultsLog) -> None:
    from kdfast.reproduction.engine.run import make_teachers

    with progress("teachers") as report:
        made = make_teachers(session, log, report)
    lines = [f"{path}: top-1 {model.metadata['test_top1']:.2f}" for path, model in made.items()]
    facts = [
        {"file": str(path), "net": model.name, "top1": model.metadata["test_top1"]} for path, model in made.items()
    ]
    show("\n".join(lines) or "these cells have no teacher", {"out": str(log.folder), "teachers": facts})


def _run(
    session: ReproductionSession,
    log: ResultsLog,
    engine: EngineConfig,
    command: str,
    *,
    jobs: int | None,
    keep_runs: bool,
    seconds: float | None,
) -> None:
    from kdfast.reproduction.engine.run import run_study
    from kdfast.reproduction.report.results import conditions, rows_of_data

    config = session.config
    labels = {run.key: str(run) for run in session.runs()}
    with progress(f"reproduce {config.study.name}") as report:
        budget = run_study(
            session,
            log,
            engine=engine,
            jobs=jobs,
            keep_runs=keep_runs,
            budget_seconds=seconds,
            on_row=functools.partial(print_row, labels),
            progress=report,
        )
    dataset = config.dataset or session.source.kind
    published = {**config.study.published, **config.study.teacher_top1}
    if published and dataset not in published:
        note(
            f"{config.study.name} has published values for {', '.join(published)}, and this data is {dataset}: if it "
            "is one of them, name it with --dataset"
        )
    rows = rows_of_data(log.results(), dataset, session.source.fingerprint)
    if rows:
        current = {conditions(run.settings) for run in session.runs()}
        write_reports(config.study, log, rows, dataset=dataset, command=command, current=current)
    if budget is not None and seconds is not None:
        show_left(session, budget, seconds, log.done())


def _given(context: typer.Context) -> dict[str, list[str]]:
    """Return the options that have another value than their default, as texts, in the order of the help."""
    found = {}
    for parameter in context.command.params:
        value = context.params.get(str(parameter.name))
        if value not in (None, (), [], False, parameter.default):
            found[str(parameter.name)] = list(map(str, value if isinstance(value, (tuple, list)) else [value]))
    return found


def _same_command(context: typer.Context, study: str) -> str:
    """Return a command with the same inputs and settings, but not restricted to cells."""
    given = {"data": ["DATA"], **_given(context)}
    flags = {parameter.name: parameter.opts[0] for parameter in context.command.params}
    words = ["kdfast", "reproduce", study]
    for name in (name for name in _OF_RUNS if name in given):
        words += [word for value in given[name] for word in (flags[name], value)]
    return shlex.join(words)


def _reproduce_theorem(out: Path, *, dry_run: bool) -> None:
    from kdfast.reproduction.theorem.page import check_theorem_files, describe, reproduce_theorem

    check_theorem_files(out)
    if dry_run:
        show(f"would write report.html and plot.svg to {out}", {"dry_run": True, "out": str(out)})
        return
    with progress("theorem") as report:
        result = reproduce_theorem(out, progress=report)
    show(f"{describe(result)}\nreport.html and plot.svg written to {out}", {"out": str(out), **result})


def _parse_budget(text: str, engine: str) -> float:
    """Return the seconds of a budget."""
    if engine != "local":
        raise UsageError(f"`budget` is {text}, and the speed of the machines of {engine} is not known: omit it")
    found = re.fullmatch(r"([0-9.]+)([smhd])", text)
    try:
        seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    except ValueError:
        seconds = 0.0
    if seconds <= 0:
        raise UsageError(f"`budget` is {text!r}: pass a number and a unit, such as 90m, 3h or 2d")
    return seconds


def _parse_seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(",") if word)
    except ValueError:
        numbers = ()
    if "," not in text and len(numbers) == 1:
        numbers = tuple(range(numbers[0]))
    if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 0 or len(numbers) > 10_000:
        raise UsageError(
            f"`seeds` is {text!r}: pass their number, or distinct seeds separated by commas, such as 0,3; a single one "
            "with a comma, such as 7,"
        )
    return numbers


def _parse_teachers(texts: list[str]) -> dict[str, str]:
    files: dict[str, str] = {}
    for text in texts:
        net, equals, path = text.partition("=")
        if not (net and equals and path) or net in files:
            raise UsageError(f"`teachers` is {text!r}: pass NAME=FILE, each network once")
        files[net] = path
    return files
