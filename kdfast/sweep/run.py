"""Run a sweep, in this process or in several."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from kdfast.files import check_writable
from kdfast.progress import Progress
from kdfast.sweep.parallel.processes import run_workers
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
        jobs: Number of runs that train at a time: on a CPU in processes, on a GPU in threads of this process, unless
            their steps rule that out, see `Session.divide_device`. 1: in this thread; None: as `choose_jobs`.
        keep_runs: Whether to keep the folder of every run.
        on_row: Called with every new row of this sweep, whichever process wrote it.
        progress: Called with (rows done, rows total, status).

    Raises:
        DivergedError: Runs diverged; all other runs have their rows.
        Interrupted: SIGTERM or Ctrl-C; finished rows are kept.
        OutputError: The folder cannot be written, or holds anything but a sweep.
        DataError: results.jsonl is not that of a sweep.
    """
    runs, log = session.runs(), ResultsLog(out)
    log.check_folder()
    check_writable(out)
    if jobs is None:
        done = log.done()
        jobs = choose_jobs(session.device, sum(run.key not in done for run in runs))
    if jobs == 1:
        run_worker(session, runs, log, keep_runs=keep_runs, on_row=on_row, progress=progress)
    elif session.device.type == "cuda" and session.divide_device(jobs):
        run_threads(session, runs, log, jobs=jobs, keep_runs=keep_runs, on_row=on_row, progress=progress)
    else:
        opened = functools.partial(Session, session.given, session.share())
        run_workers(opened, runs, log, jobs=jobs, keep_runs=keep_runs, on_row=on_row, progress=progress)
