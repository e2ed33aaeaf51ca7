"""Run the cells of a study, in this process or in several."""

from __future__ import annotations

import functools
import time

from kdfast.files import check_writable
from kdfast.progress import Progress
from kdfast.reproduction.engine.budget import Budget, make_budget
from kdfast.reproduction.engine.session import ReproductionSession
from kdfast.sweep.parallel.processes import run_workers
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.work import OnRow, run_worker


def run_study(
    session: ReproductionSession,
    log: ResultsLog,
    *,
    jobs: int = 1,
    keep_runs: bool = False,
    budget_seconds: float | None = None,
    on_row: OnRow | None = None,
    progress: Progress | None = None,
) -> Budget | None:
    """Run every cell and seed that has no row yet; several processes, calls and machines share them.

    Args:
        session: The opened inputs.
        log: The log of the folder.
        jobs: Number of processes that train; 1: this process.
        keep_runs: Whether to keep the folder of every run.
        budget_seconds: Begin no run that would not end within so many seconds from now; None: no limit.
        on_row: Called with every new row, whichever process wrote it.
        progress: Called with (rows done, rows total, status).

    Returns:
        The budget; None without one.

    Raises:
        DivergedError: Runs diverged; all other runs have their rows.
        Interrupted: SIGTERM or Ctrl-C; the same call resumes.
        OutputError: The folder cannot be written, or holds anything but a study.
        DataError: results.jsonl is not that of a study.
    """
    deadline = None if budget_seconds is None else time.time() + budget_seconds
    runs = session.runs()
    check_writable(log.folder)
    log.begin()
    done = log.done()
    pending = [run for run in runs if run.key not in done]
    budget = None if deadline is None else make_budget(session, pending, log, deadline, jobs)
    if jobs == 1:
        run_worker(session, runs, log, keep_runs=keep_runs, admit=budget, on_row=on_row, progress=progress)
    else:
        opened = functools.partial(ReproductionSession, session.config, session.share())
        run_workers(opened, runs, log, jobs=jobs, keep_runs=keep_runs, admit=budget, on_row=on_row, progress=progress)
    return budget
