"""`kdfast sweep`: methods x fractions x with and without the teacher x seeds, in one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from kdfast.cli import options, training
from kdfast.cli.progress import progress
from kdfast.errors import UsageError

if TYPE_CHECKING:
    from kdfast.sweep.session import Session

Number = TypeVar("Number", int, float)


def sweep(
    out: Annotated[Path, typer.Option("--out", help="The sweep's folder; the same command goes on with it.")],
    data: Annotated[str | None, typer.Option("--data", help="As for the other commands.", metavar="PATH")] = None,
    student: Annotated[
        str | None, typer.Option("--student", help="Network, such as resnet8; torchvision:NAME or timm:NAME.")
    ] = None,
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            help="Separated by commas: SCORE (with the rule it was published with), SCORE/RULE, or a method that "
            "chooses by itself; options as NAME:a=2,b=3. Such as random,el2n,influence:kind=self/beta:a=2,b=3.",
        ),
    ] = "random",
    fractions: Annotated[str, typer.Option("--fractions", help="Shares to keep, separated by commas.")] = "0.1,0.3,0.5",
    kd: Annotated[str, typer.Option("--kd", help="on: with the teacher; off: without; both.")] = "both",
    seeds: Annotated[str, typer.Option("--seeds", help="Separated by commas; each draws subset and student.")] = "0",
    steps: Annotated[
        int, typer.Option("--steps", help="Steps of every run, whatever its fraction; rounded to whole epochs.", min=1)
    ] = 1250,
    cache: Annotated[str | None, typer.Option("--cache", help="The teacher's cache, of all samples.")] = None,
    dynamics: Annotated[str | None, typer.Option("--dynamics", help="Recorded by `kdfast dynamics`.")] = None,
    scores: Annotated[
        list[str] | None, typer.Option("--scores", help="NAME=FILE: a method NAME with the scores of FILE; repeatable.")
    ] = None,
    batch_size: training.BatchSize = 64,
    lr: training.Lr = 0.05,
    momentum: training.Momentum = 0.9,
    weight_decay: training.WeightDecay = 5e-4,
    schedule: training.Schedule = "cosine",
    warmup_epochs: training.Warmup = 0.0,
    alpha: Annotated[
        str, typer.Option("--alpha", help="Weight of the teacher's term in the runs with it, in (0, 1], or auto.")
    ] = "auto",
    temperature: Annotated[float, typer.Option("--temperature", help="Temperature of the teacher's term.")] = 4.0,
    views: training.Views = 0,
    view_seed: training.ViewSeed = None,
    precision: training.Precision = "fp32",
    loader: options.Loader = "auto",
    size: options.Size = None,
    device: options.Device = "auto",
    jobs: Annotated[int, typer.Option("--jobs", help="Processes that train at the same time.", min=1)] = 1,
    keep_runs: Annotated[
        bool, typer.Option("--keep-runs", help="Keep the folder of every run, with its student.")
    ] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Only make table and plot again; needs no option but --out.")
    ] = False,
    dry_run: options.DryRun = False,
    config: options.Config = None,
) -> None:
    """Train a student for every method, fraction and seed, with and without the teacher, and compare them in one table.

    Rows are appended to results.jsonl as they are finished; a row that is there is not run again, and several of these
    commands at once share the work. table.md and plot.png are made from the rows.
    """
    from kdfast.sweep.report import report_sweep

    if not report_only:
        from kdfast.sweep.grid import SweepConfig
        from kdfast.sweep.run import run_sweep
        from kdfast.sweep.session import Session
        from kdfast.sweep.spec import parse_methods

        if data is None or student is None:
            raise UsageError("a sweep needs --data and --student; only --report-only goes without")
        run = {
            "student": student,
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
        }
        session = Session(
            SweepConfig(
                data=data,
                methods=parse_methods(methods),
                fractions=_numbers("--fractions", fractions, float),
                kd=_kd(kd),
                seeds=_numbers("--seeds", seeds, int),
                steps=steps,
                run=run,
                alpha=alpha,
                cache=cache,
                dynamics=dynamics,
                scores=dict(_name_and_file(text) for text in scores or ()),
                loader=loader,
                size=size,
                device=device,
            )
        )
        if dry_run:
            print(_plan(session, out))
            return
        with progress("sweep") as report:
            run_sweep(session, out, jobs=jobs, keep=keep_runs, on_row=_tell, advance=report)
    print(f"\n{report_sweep(out)}\ntable.md and plot.png written to {out}")


def _tell(row: dict[str, Any]) -> None:
    print(
        f"{row['method']} f={row['fraction']:g} {'KD' if row['kd'] else 'plain'} seed {row['seed']}: "
        f"top-1 {row['test_top1']:.2f} ({row['steps']} steps, {row['seconds']:.1f} s)",
        flush=True,
    )


def _plan(session: Session, out: Path) -> str:
    from kdfast.sweep.results_log import Ledger

    done, lines, left = Ledger(out).done(), [], 0
    for cell in session.cells():
        samples = session.samples(cell.fraction)
        epochs = session.config.run_config(samples, seed=cell.seed).epochs
        lines.append(f"{cell}: {'there' if cell.key in done else 'to run'}, {samples} samples, {epochs} epochs")
        left += cell.key not in done
    return "\n".join([*lines, f"would run {left} of {len(lines)} rows"])


def _kd(text: str) -> tuple[bool, ...]:
    from kdfast.sweep.grid import KD

    if text not in KD:
        raise UsageError(f"--kd is {text!r}; needed: one of {', '.join(KD)}")
    return KD[text]


def _numbers(flag: str, text: str, kind: Callable[[str], Number]) -> tuple[Number, ...]:
    try:
        return tuple(kind(word) for word in text.split(","))
    except ValueError as error:
        raise UsageError(f"{flag} is {text!r}; needed: numbers separated by commas") from error


def _name_and_file(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise UsageError(f"--scores is {text!r}; needed: NAME=FILE")
    return name, path
