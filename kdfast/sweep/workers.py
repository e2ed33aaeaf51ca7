"""Run a sweep in several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from kdfast.errors import Interrupted, KdfastError
from kdfast.progress import Progress
from kdfast.sweep.grid import SweepConfig, SweepRun
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.session import Session
from kdfast.sweep.work import POLL_SECONDS, OnRow, report_rows, run_worker


def run_workers(
    config: SweepConfig,
    runs: Sequence[SweepRun],
    log: ResultsLog,
    *,
    jobs: int,
    keep_runs: bool,
    on_row: OnRow | None = None,
    progress: Progress | None = None,
) -> None:
    """Start processes that share the runs of a sweep, and wait for them.

    Each opens the inputs once and calls `kdfast.sweep.work.run_worker`. Together they use as many threads as torch
    would use in this process.

    Args:
        config: The settings of the sweep.
        runs: Its runs.
        log: The log of its rows.
        jobs: Number of processes.
        keep_runs: Whether to keep the folder of every run.
        on_row: Called with every new row of this sweep.
        progress: Called with (rows done, rows total, status).

    Raises:
        KdfastError: The first error of a process, once all have ended.
        Interrupted: A process was killed and rows are missing; finished rows are kept.
    """
    # A forked process would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // jobs)
    arguments = (config, log.folder, keep_runs, threads, failures)
    workers = [context.Process(target=_work_in_process, args=arguments, name=f"sweep-{k}") for k in range(jobs)]
    done = log.done()
    try:
        with _ctrl_c_ignored():
            for worker in workers:
                worker.start()
        while any(worker.is_alive() for worker in workers):
            done = report_rows(log, runs, done, on_row)
            if progress is not None:
                progress(sum(run.key in done for run in runs), len(runs), f"{jobs} processes")
            time.sleep(POLL_SECONDS)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
    done = report_rows(log, runs, done, on_row)
    if not failures.empty():
        raise failures.get()
    if any(run.key not in done for run in runs):
        codes = ", ".join(str(worker.exitcode) for worker in workers)
        raise Interrupted(
            f"processes of the sweep ended early (exit codes {codes}): run the same command again to resume"
        )


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Let processes started in the block ignore Ctrl-C from their first moment; SIGTERM stops them, once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work_in_process(config: SweepConfig, folder: Path, keep_runs: bool, threads: int, failures: Any) -> None:
    # Ctrl-C in a terminal signals the whole process group, and training aborts on a second signal: get only SIGTERM.
    os.setsid()
    torch.set_num_threads(threads)
    try:
        session = Session(config)
        run_worker(session, session.runs(), ResultsLog(folder), keep_runs=keep_runs)
    except KdfastError as error:
        failures.put(error)
