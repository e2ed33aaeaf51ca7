"""Several processes that train at the same time, and the one that looks after them."""

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
from kdfast.sweep.grid import Cell, SweepConfig
from kdfast.sweep.results_log import Ledger
from kdfast.sweep.session import Session
from kdfast.sweep.work import POLL, Advance, OnRow, tell, work


def supervise(
    config: SweepConfig,
    cells: Sequence[Cell],
    ledger: Ledger,
    *,
    jobs: int,
    keep: bool,
    on_row: OnRow | None = None,
    advance: Advance | None = None,
) -> None:
    """Start so many processes on the rows of a sweep, and wait for them.

    Each opens the inputs once and takes rows as `kdfast.sweep.work.work` does; together they use as many threads as
    torch would use in this process.

    Args:
        config: The sweep's settings.
        cells: Its rows.
        ledger: Where they go.
        jobs: How many processes.
        keep: Leave the folder of every run.
        on_row: Told every row as it comes.
        advance: Told (rows done, rows in all, what is going on).

    Raises:
        KdfastError: The first error of a process, after all have ended.
        Interrupted: If a process was killed and rows are missing; the rows that are there are kept.
    """
    # A forked process would inherit torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    threads = max(1, torch.get_num_threads() // jobs)
    arguments = (config, ledger.folder, keep, threads, failures)
    workers = [context.Process(target=_worker, args=arguments, name=f"sweep-{k}") for k in range(jobs)]
    seen = ledger.done()
    try:
        with _ctrl_c_ignored():
            for worker in workers:
                worker.start()
        while any(worker.is_alive() for worker in workers):
            seen = tell(ledger, cells, seen, on_row)
            if advance is not None:
                advance(sum(cell.key in seen for cell in cells), len(cells), f"{jobs} processes")
            time.sleep(POLL)
    finally:
        for worker in workers:
            if worker.pid is not None:
                worker.terminate()
                worker.join()
    seen = tell(ledger, cells, seen, on_row)
    if not failures.empty():
        raise failures.get()
    if any(cell.key not in seen for cell in cells):
        codes = ", ".join(str(worker.exitcode) for worker in workers)
        raise Interrupted(f"processes of the sweep ended early (exit codes {codes}); the same command goes on")


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Processes started inside ignore Ctrl-C from their first moment: they are told by SIGTERM, once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _worker(config: SweepConfig, folder: Path, keep: bool, threads: int, failures: Any) -> None:
    # A terminal's Ctrl-C goes to the whole group, and training obeys a second signal at once: hear only the SIGTERM.
    os.setsid()
    torch.set_num_threads(threads)
    try:
        session = Session(config)
        work(session, session.cells(), Ledger(folder), keep=keep)
    except KdfastError as error:
        failures.put(error)
