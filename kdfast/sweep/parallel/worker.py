"""A worker: it opens the inputs once, and runs what no other worker runs until every run has its row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from kdfast.errors import KdfastError
from kdfast.sweep.parallel.command import Command
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.work import RunSession, run_worker


@dataclass(frozen=True)
class Task:
    """What a worker is given; it is pickled.

    Attributes:
        open_session: Opens the inputs.
        log: The log of the rows.
        keep_runs: Whether to keep the folder of every run.
        threads: Threads of the worker.
        admit: As for `kdfast.sweep.work.run_worker`.
        command: The command that started the worker, if the worker may be on another machine.
    """

    open_session: Callable[[], RunSession[Any]]
    log: ResultsLog
    keep_runs: bool
    threads: int
    admit: Callable[[str], bool] | None = None
    command: Command | None = None


def work(task: Task) -> KdfastError | None:
    """Run what no other worker runs, in this process.

    Returns:
        The error that ended the worker, which engines pass on as it is; None if every run has its row.
    """
    try:
        if task.command is not None:
            task.command.enter()
        torch.set_num_threads(task.threads)
        session = task.open_session()
        runs = session.runs()
        if task.command is not None:
            task.command.check_keys(run.key for run in runs)
        run_worker(session, runs, task.log, keep_runs=task.keep_runs, admit=task.admit)
    except KdfastError as error:
        return error
    return None
