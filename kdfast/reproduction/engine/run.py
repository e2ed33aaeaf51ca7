"""Run the cells of a study, one after another, several at a time, or on a cluster; or make their teachers alone."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

from kdfast.files import check_writable
from kdfast.files.interrupt import StopRequest
from kdfast.nets.checkpoint import Model
from kdfast.progress import Progress
from kdfast.reproduction.engine.budget import Budget, make_budget
from kdfast.reproduction.engine.session import ReproductionSession
from kdfast.sweep.parallel.engine import LOCAL, EngineConfig
from kdfast.sweep.parallel.run import run_workers
from kdfast.sweep.parallel.threads import run_threads
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.run import choose_jobs
from kdfast.sweep.work import POLL_SECONDS, OnRow, Postponed, run_worker


def make_teachers(session: ReproductionSession, log: ResultsLog, progress: Progress | None = None) -> dict[Path, Model]:
    """Make the teachers of the session's cells, and return them by their files.

    Several calls and machines share them: each teacher is trained by one.

    Raises:
        DivergedError: The loss of a teacher is not finite.
        Interrupted: SIGTERM or Ctrl-C; the same call resumes.
        OutputError: The folder cannot be written, or holds anything but a study.
    """
    check_writable(log.folder)
    log.begin()
    places = session.places
    specs = [places.teacher_spec(cell) for cell in session.config.cells if cell.teacher is not None]
    pending = {places.teacher_path(spec): spec for spec in specs}
    made: dict[Path, Model] = {}
    while pending:
        StopRequest.check()
        for path, spec in pending.items():
            with contextlib.suppress(Postponed):
                made[path] = session.artifacts.teacher(spec, progress)
        left = {path: spec for path, spec in pending.items() if path not in made}
        if len(left) == len(pending):
            time.sleep(POLL_SECONDS)
        pending = left
    return made


def run_study(
    session: ReproductionSession,
    log: ResultsLog,
    *,
    engine: EngineConfig | None = None,
    jobs: int | None = 1,
    keep_runs: bool = False,
    budget_seconds: float | None = None,
    on_row: OnRow | None = None,
    progress: Progress | None = None,
) -> Budget | None:
    """Run every cell and seed that has no row yet; several processes, calls and machines share them.

    Args:
        session: The opened inputs.
        log: The log of the folder.
        engine: Where the runs train; None: on this machine, where the session computes.
        jobs: Number of runs that train at a time: on a CPU in processes, on a GPU in threads of this process, unless
            their steps rule that out, see `ReproductionSession.divide_device`. 1: in this thread; None: as
            `choose_jobs`. On a cluster the number of workers; None: as many as a Ray cluster has room for.
        keep_runs: Whether to keep the folder of every run.
        budget_seconds: Begin no run that would not end within so many seconds from now; None: no limit.
        on_row: Called with every new row, whichever process wrote it.
        progress: Called with (rows done, rows total, status).

    Returns:
        The budget; None without one.

    Raises:
        DivergedError: Runs diverged; all other runs have their rows.
        Interrupted: SIGTERM or Ctrl-C; the same call resumes.
        OutputError: The folder cannot be written, or holds anything but a study; or machines do not share it.
        DataError: results.jsonl is not that of a study.
        UsageError: The engine cannot start workers.
    """
    deadline = None if budget_seconds is None else time.time() + budget_seconds
    runs = session.runs()
    check_writable(log.folder)
    log.begin()
    done = log.done()
    pending = [run for run in runs if run.key not in done]
    engine = engine or EngineConfig(device=str(session.device))
    if jobs is None and engine.name == LOCAL:
        jobs = choose_jobs(session.device, len(pending))
    alone = not pending or (engine.name == LOCAL and jobs == 1)
    on_a_gpu = engine.name == LOCAL and session.device.type == "cuda"
    threads = jobs if jobs and on_a_gpu and not alone and session.divide_device(jobs) else None
    budget = None if deadline is None else make_budget(session, pending, log, deadline, 1 if threads else jobs or 1)
    follow: dict[str, Any] = {"keep_runs": keep_runs, "admit": budget, "on_row": on_row, "progress": progress}
    if alone:
        run_worker(session, runs, log, **follow)
    elif threads:
        run_threads(session, runs, log, jobs=threads, **follow)
    elif engine.name == LOCAL:
        opened = functools.partial(ReproductionSession, session.config, session.share())
        run_workers(opened, runs, log, engine=engine, jobs=jobs, **follow)
    else:
        config = dataclasses.replace(session.config, device=engine.device)
        run_workers(functools.partial(ReproductionSession, config), runs, log, engine=engine, jobs=jobs, **follow)
    return budget
