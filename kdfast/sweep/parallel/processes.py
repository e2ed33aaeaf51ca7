"""Run a sweep or a study in several processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from kdfast.errors import Interrupted, KdfastError
from kdfast.progress import Progress
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.work import POLL_SECONDS, OnRow, Run, RunSession, report_rows, run_worker


def run_workers(
    open_session: Callable[[], RunSession[Any]],
    runs: Sequence[Run],
    log: ResultsLog,
    *,
    jobs: int,
    keep_runs: bool,
    admit: Callable[[str], bool] | None = None,
    on_row: OnRow | None = None,
    progress: Progress | None = None,
) -> None:
    """Start processes that share runs, and wait for them.

    Each opens the inputs once and calls `kdfast.sweep.work.run_worker`. Together they use as many threads as torch
    would use in this process.

    Args:
        open_session: Opens the inputs in each process; it is pickled.
        runs: The runs.
        log: The log of their rows; it is pickled too.
        jobs: Number of processes.
        keep_runs: Whether to keep the folder of every run.
        admit: As for `run_worker`; it is pickled too.
        on_row: Called with every new row of these runs.
        progress: Called with (rows done, rows total, status).

    Raises:
        KdfastError: The first error of a process, once all have ended.
        Interrupted: A process was killed and rows are missing; finished rows are kept.
    """
    # A forked process would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // jobs)
    arguments = (open_session, log, keep_runs, threads, admit, failures)
    workers = [context.Process(target=_work_in_process, args=arguments, name=f"worker-{k}") for k in range(jobs)]
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
    killed = any(worker.exitcode for worker in workers)
    if any(run.key not in done for run in runs) and (killed or admit is None):
        codes = ", ".join(str(worker.exitcode) for worker in workers)
        raise Interrupted(
            f"processes of this command ended early (exit codes {codes}): run the same command again to resume"
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


def _work_in_process(
    open_session: Callable[[], RunSession[Any]],
    log: ResultsLog,
    keep_runs: bool,
    threads: int,
    admit: Callable[[str], bool] | None,
    failures: Any,
) -> None:
    # Ctrl-C in a terminal signals the whole process group, and training aborts on a second signal: get only SIGTERM.
    os.setsid()
    torch.set_num_threads(threads)
    try:
        session = open_session()
        run_worker(session, session.runs(), log, keep_runs=keep_runs, admit=admit)
    except KdfastError as error:
        failures.put(error)
