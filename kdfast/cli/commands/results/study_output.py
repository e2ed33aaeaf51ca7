"""What `kdfast reproduce` prints: studies, planned runs, finished rows, the table, and what is left."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdfast.cli.output import note, show
from kdfast.cli.progress import format_seconds
from kdfast.errors import DataError
from kdfast.text import counted

if TYPE_CHECKING:
    from collections.abc import Container

    from kdfast.reproduction.engine.budget import Budget
    from kdfast.reproduction.engine.session import ReproductionSession
    from kdfast.reproduction.report.results import Rows
    from kdfast.reproduction.study import Study
    from kdfast.sweep.results_log import ResultsLog

THEOREM = "theorem"  # no study: it has no cells


def show_list() -> None:
    """Print the studies that `kdfast reproduce` knows."""
    from kdfast.reproduction.study_file import load_study, study_names

    studies = [load_study(name) for name in study_names()]
    lines = [
        f"{s.name:<16} {len(s.cells):>4} cells, {s.images / 1e6:>6,.0f} million images a seed: {s.title}"
        for s in studies
    ]
    lines.append(
        f"{THEOREM:<16} no data, under a minute: a student's bias and its teacher's data, by formula and simulation"
    )
    facts = [
        {"name": s.name, "title": s.title, "source": s.source, "cells": len(s.cells), "images": s.images}
        for s in studies
    ]
    show("\n".join(lines), {"studies": facts})


def describe_plan(session: ReproductionSession, log: ResultsLog) -> tuple[str, dict[str, Any]]:
    """Return the runs and what they need, with estimated times, in words and as JSON values."""
    from kdfast.reproduction.engine.budget import make_budget

    runs, done = session.runs(), log.done()
    pending = [run for run in runs if run.key not in done]
    estimate = make_budget(session, pending, log, time.time())
    lines, rows = [], []
    made: set[Path] = set()
    total = 0.0
    for run in runs:
        if run.key in done:
            lines.append(f"{run}: done")
            rows.append({"run": str(run), "done": True})
            continue
        cost = estimate.costs[run.key]
        before = {path: seconds for path, seconds in cost.before.items() if path not in made and not path.exists()}
        made |= before.keys()
        training = estimate.training_seconds(run.key)
        total += training + sum(before.values())
        for path, seconds in before.items():
            lines.append(f"  makes {path}: {format_seconds(seconds)}")
        targets = "" if run.targets is None else f", targets from {run.targets}"
        lines.append(
            f"{run}: {counted(run.epochs, 'epoch')}, {cost.images:,} images, {format_seconds(training)}{targets}"
        )
        rows.append({"run": str(run), "done": False, "epochs": run.epochs, "images": cost.images, "seconds": training})
    lines.append(f"would run {len(pending)} of {len(runs)}, in about {format_seconds(total)}")
    return "\n".join(lines), {"dry_run": True, "to_run": len(pending), "seconds": total, "rows": rows}


def print_row(labels: dict[str, str], row: dict[str, Any]) -> None:
    """Print a finished run; `labels` names the runs by their keys."""
    note(f"{labels[row['key']]}: top-1 {row['test_top1']:.2f} ({row['steps']} steps, {format_seconds(row['seconds'])})")


def write_reports(
    study: Study, log: ResultsLog, rows: Rows, *, dataset: str, command: str, current: Container[str] = ()
) -> None:
    """Write table.md, report.html and plot.svg from the rows of one data set, and print the table.

    Args:
        study: The study.
        log: The log of the rows.
        rows: Rows of one data set.
        dataset: Name of the data among the published values.
        command: The command, without restrictions, for the cells without a row.
        current: See `kdfast.reproduction.report.results.collect`.
    """
    from kdfast.reproduction.report.page import write_report
    from kdfast.reproduction.report.results import collect
    from kdfast.reproduction.table import table, write_table

    found = collect(study, rows, dataset, current)
    text = "\n".join(table(results) for results in found)
    write_table(text, log.folder)
    write_report(found, log.folder, command)
    known = [row for results in found for row in results.rows]
    written = f"table.md and report.html written to {log.folder}"
    show(f"\n{text}\n{written}", {"out": str(log.folder), "rows": known})


def report_again(study: Study, log: ResultsLog, *, dataset: str | None, command: str) -> None:
    """Write the files of a report again from the rows of earlier commands.

    Raises:
        DataError: There is no row.
    """
    from kdfast.reproduction.report.results import rows_of_data

    if not (rows := log.results()):
        raise DataError(f"{log.folder} has no row of a study: pass as `out` the folder of one with a finished run")
    shown = dataset or str(rows[-1]["dataset"])
    write_reports(study, log, rows_of_data(rows, shown), dataset=shown, command=command)


def show_left(session: ReproductionSession, budget: Budget, whole: float, done: set[str]) -> None:
    """Say which runs are left, and whether the same command would begin one of them.

    Args:
        session: The opened inputs.
        budget: The budget.
        whole: Seconds of the budget when the command began.
        done: Keys of the rows.
    """
    left = [run for run in session.runs() if run.key not in done]
    if not left:
        return
    before = {path: seconds for run in left for path, seconds in budget.costs[run.key].before.items()}
    seconds = sum(seconds for path, seconds in before.items() if not path.exists())
    seconds += sum(budget.training_seconds(key) for key in {run.key for run in left})
    note(f"{counted(len(left), 'run')} left, about {format_seconds(seconds)} on this machine; the next: {left[0]}")
    needed = min(budget.seconds(run.key) for run in left)
    if needed < whole:
        note("Run the same command again.")
    else:
        note(f"None of them ends within the budget: pass --budget {math.ceil(1.1 * needed / 60)}m or more.")
