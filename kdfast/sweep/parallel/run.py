"""Run the runs of a sweep or a study on the workers of an engine."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kdfast.progress import Progress
from kdfast.sweep.parallel.command import check_locks, running_command
from kdfast.sweep.parallel.engine import LOCAL, RAY, SLURM, EngineConfig
from kdfast.sweep.parallel.processes import Processes
from kdfast.sweep.parallel.ray_tasks import RayTasks, connect_ray
from kdfast.sweep.parallel.slurm_jobs import SlurmJobs, find_slurm
from kdfast.sweep.parallel.watch import Workers, watch
from kdfast.sweep.parallel.worker import Task
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.work import OnRow, Run, RunSession


def prepare_engine(engine: EngineConfig) -> None:
    """Connect to the cluster of an engine before the inputs are opened.

    Raises:
        UsageError: Its library is not installed, or there is no such cluster.
    """
    if engine.name == RAY:
        connect_ray(engine.ray_address)
    elif engine.name == SLURM:
        find_slurm()


def run_workers(
    open_session: Callable[[], RunSession[Any]],
    runs: Sequence[Run],
    log: ResultsLog,
    *,
    engine: EngineConfig,
    jobs: int | None,
    keep_runs: bool,
    admit: Callable[[str], bool] | None = None,
    on_row: OnRow | None = None,
    progress: Progress | None = None,
) -> None:
    """Start workers that share runs, and wait for them.

    Each opens the inputs once and calls `kdfast.sweep.work.run_worker`. Processes of this machine together use as many
    threads as torch would use in this process; workers on a cluster use those of the engine.

    Args:
        open_session: Opens the inputs in each worker; it is pickled.
        runs: The runs.
        log: The log of their rows; it is pickled too.
        engine: Where the workers run; `prepare_engine` has connected to its cluster.
        jobs: Number of workers; None: as many as the Ray cluster has room for.
        keep_runs: Whether to keep the folder of every run.
        admit: As for `run_worker`; it is pickled too.
        on_row: Called with every new row of these runs.
        progress: Called with (rows done, rows total, status).

    Raises:
        UsageError: The engine cannot start workers.
        KdfastError, Interrupted: As `kdfast.sweep.parallel.watch.watch`.
    """
    follow = functools.partial(watch, runs=runs, log=log, admit=admit, on_row=on_row, progress=progress)
    task = Task(open_session, log, keep_runs, engine.cpus, admit)
    if engine.name == LOCAL:
        assert jobs is not None, "chosen by the caller"
        follow(Processes(dataclasses.replace(task, threads=max(1, torch.get_num_threads() // jobs)), jobs))
        return
    log.begin()
    done = log.done()
    left = sum(run.key not in done for run in runs)
    with running_command(log, (run.key for run in runs)) as command:
        task = dataclasses.replace(task, command=command)
        workers: Workers
        if engine.name == RAY:
            workers = RayTasks(task, engine, jobs, left)
        else:
            assert jobs is not None, "the caller has refused it"
            workers = SlurmJobs(task, engine, min(jobs, left))
        follow(workers, check=functools.partial(check_locks, command))
