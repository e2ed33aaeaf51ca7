"""Run a sweep or a study in threads of this process, which share the images on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from kdfast.data.loaders import ResidentLoader
from kdfast.distillation.plan import Plan
from kdfast.distillation.targets import CachedTargets
from kdfast.errors import Interrupted, KdfastError
from kdfast.files.interrupt import StopRequest
from kdfast.nets.fit import draws_random_numbers
from kdfast.nets.initial import build_started_net
from kdfast.progress import Progress
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.work import POLL_SECONDS, OnRow, Run, RunSession, report_rows, run_worker


def can_train_in_threads(plan: Plan) -> bool:
    """Return whether runs like this one can train at the same time, in threads, on a GPU.

    Their steps must run as CUDA graphs, and must not draw from torch's global generators, which the threads share.
    Their images must be resident, since other loaders serve one run at a time. Batches of a cache of features compute
    their logits outside the graph.
    """
    features = isinstance(plan.targets, CachedTargets) and plan.targets.cache.head is not None
    if not plan.can_capture() or plan.loader.name != ResidentLoader.name or features:
        return False
    config = plan.config
    with torch.random.fork_rng(devices=[]):
        net = build_started_net(config.student, len(plan.source.classes), config.init)
    return not draws_random_numbers(net, config.student, plan.source.view_spec.size)


def run_threads(
    session: RunSession[Any],
    runs: Sequence[Run],
    log: ResultsLog,
    *,
    jobs: int,
    keep_runs: bool,
    admit: Callable[[str], bool] | None = None,
    on_row: OnRow | None = None,
    progress: Progress | None = None,
) -> None:
    """Run the runs in threads, each by `kdfast.sweep.work.run_worker`, and wait for them.

    A run has the same bits as in a process of its own. Its steps must not draw from torch's global generators, which
    the threads share; see `kdfast.distillation.cuda_graph.EXCLUSIVE` for what only one thread does at a time.

    Args:
        session: The opened inputs.
        runs: The runs.
        log: The log of their rows.
        jobs: Number of threads.
        keep_runs: Whether to keep the folder of every run.
        admit: As for `run_worker`.
        on_row: Called with every new row of these runs, in the calling thread.
        progress: Called with (rows done, rows total, status), in the calling thread.

    Raises:
        KdfastError: The first error of a thread, once all have ended.
        Interrupted: SIGTERM or Ctrl-C; every run has saved its state.
    """
    done = log.done()
    with StopRequest(), ThreadPoolExecutor(jobs, thread_name_prefix="kdfast-run") as pool:
        workers = [pool.submit(run_worker, session, runs, log, keep_runs=keep_runs, admit=admit) for _ in range(jobs)]
        while not all(worker.done() for worker in workers):
            done = report_rows(log, runs, done, on_row)
            if progress is not None:
                progress(sum(run.key in done for run in runs), len(runs), f"{jobs} at a time")
            time.sleep(POLL_SECONDS)
    report_rows(log, runs, done, on_row)
    _raise_first(workers)


def _raise_first(workers: Sequence[Future[None]]) -> None:
    """Raise the first error of the threads; those that were only interrupted come last."""
    errors = [error for error in (worker.exception() for worker in workers) if error is not None]
    for error in sorted(errors, key=lambda error: (isinstance(error, Interrupted), isinstance(error, KdfastError))):
        raise error
