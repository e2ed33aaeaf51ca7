"""Run a sweep, in this process, in several or on a cluster."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import torch

from kdfast.files import check_writable
from kdfast.progress import Progress
from kdfast.sweep.parallel.engine import LOCAL, EngineConfig
from kdfast.sweep.parallel.run import run_workers
from kdfast.sweep.parallel.threads import run_threads
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.session import Session
from kdfast.sweep.work import OnRow, run_worker

# Of ResNet-32 on an H200, 2, 4 and 8 at a time train 1.4, 1.8 and 2.0 times as many images per second as one.
_ON_A_GPU = 4


def choose_jobs(device: torch.device, runs: int) -> int:
    """Return how many runs should train at a time.

    On a CPU as many as torch uses threads, because several threads train more images in one small network each than
    together in one, see `bench/bench_jobs.py`. On a GPU four, which leave little of it idle.

    Args:
        device: Where they train.
        runs: Runs that are left.
    """
    return max(1, min(runs, _ON_A_GPU if device.type == "cuda" else torch.get_num_threads()))


def run_sweep(
    session: Session,
    out: Path,
    *,
    engine: EngineConfig | None = None,
    jobs: int | None = 1,
    keep_runs: bool = False,
    on_row: OnRow | None = None,
    progress: Progress | None = None,
) -> None:
    """Run every run of the sweep that has no row yet.

    Several processes and several calls at once share the runs. Each call returns when every run has its row.

    Args:
        session: The opened sweep.
        out: Folder of the sweep; created if missing.
        engine: Where the runs train; None: on this machine, where the session computes.
        jobs: Number of runs that train at a time: on a CPU in processes, on a GPU in threads of this process, unless
            their steps rule that out, see `Session.divide_device`. 1: in this thread; None: as `choose_jobs`. On a
            cluster the number of workers; None: as many as a Ray cluster has room for.
        keep_runs: Whether to keep the folder of every run.
        on_row: Called with every new row of this sweep, whichever process wrote it.
        progress: Called with (rows done, rows total, status).

    Raises:
        DivergedError: Runs diverged; all other runs have their rows.
        Interrupted: SIGTERM or Ctrl-C; finished rows are kept.
        OutputError: The folder cannot be written, or holds anything but a sweep; or machines do not share it.
        DataError: results.jsonl is not that of a sweep.
        UsageError: The engine cannot start workers.
    """
    runs, log = session.runs(), ResultsLog(out)
    log.check_folder()
    check_writable(out)
    engine = engine or EngineConfig(device=str(session.device))
    done = log.done()
    left = sum(run.key not in done for run in runs)
    follow: dict[str, Any] = {"keep_runs": keep_runs, "on_row": on_row, "progress": progress}
    if engine.name != LOCAL and left:
        config = dataclasses.replace(session.given, device=engine.device)
        run_workers(functools.partial(Session, config), runs, log, engine=engine, jobs=jobs, **follow)
        return
    jobs = choose_jobs(session.device, left) if jobs is None else jobs
    if jobs == 1 or not left:
        run_worker(session, runs, log, **follow)
    elif session.device.type == "cuda" and session.divide_device(jobs):
        run_threads(session, runs, log, jobs=jobs, **follow)
    else:
        opened = functools.partial(Session, session.given, session.share())
        run_workers(opened, runs, log, engine=engine, jobs=jobs, **follow)
