"""Workers in an array of Slurm jobs, which queue themselves again when their time is over."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import signal
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from kdfast.errors import Interrupted, KdfastError, UsageError
from kdfast.files import make_subfolder
from kdfast.sweep.parallel.engine import EngineConfig
from kdfast.sweep.parallel.worker import Task, work

JOBS = "slurm"
"""Folder, in that of the rows, of the jobs' scripts, logs and results."""

# A run comes further in every job, so that any number of them may run out of time.
_RESTARTS = 1_000_000
# Slurm kills a job 30 seconds after it has asked it to stop.
_SAVE_SECONDS = 45.0


class SlurmJobs:
    """Jobs that each call `kdfast.sweep.parallel.worker.work`.

    Args:
        task: What each is given.
        engine: The resources of each, and options of sbatch.
        jobs: Number of jobs.

    Raises:
        UsageError: Slurm refuses the jobs.
    """

    def __init__(self, task: Task, engine: EngineConfig, jobs: int) -> None:
        self._submitit: Any = _import_submitit()
        self._errors: list[KdfastError] = []
        self._lost: list[str] = []
        logging.getLogger("submitit").setLevel(logging.ERROR)
        executor = self._submitit.SlurmExecutor(make_subfolder(task.log.folder, JOBS), max_num_timeout=_RESTARTS)
        executor.update_parameters(**sbatch_parameters(engine, jobs))
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # which submitit writes the messages of sbatch to
                self._pending = executor.submit_array([SlurmWorker(task)] * jobs)
        except self._submitit.core.utils.FailedJobError as error:
            reason = [line for line in str(error).splitlines() if line.strip()][-1].strip()
            reason = reason.removeprefix("sbatch: error: ").removeprefix("Batch job submission failed: ")
            raise UsageError(f"Slurm refuses the jobs ({reason}): change `slurm_option`") from error

    def describe(self) -> str:
        """Return how many jobs have not ended."""
        return "1 job of Slurm" if len(self._pending) == 1 else f"{len(self._pending)} jobs of Slurm"

    def have_ended(self) -> bool:
        """Return whether every job has ended, and keep what they returned."""
        ended = [job for job in self._pending if job.done()]
        self._pending = [job for job in self._pending if job not in ended]
        for job in ended:
            self._keep(job)
        return not self._pending

    def _keep(self, job: Any) -> None:
        try:
            error = job.result()
        except (self._submitit.core.utils.UncompletedJobError, self._submitit.core.utils.FailedJobError):
            self._lost.append(f"job {job.job_id}, see {job.paths.stderr}")
        else:
            if error is not None:
                self._errors.append(error)

    def stop(self) -> None:
        """Cancel the jobs that have not ended, and wait until they have saved their states."""
        for job in self._pending:
            job.cancel(check=False)
        until = time.monotonic() + _SAVE_SECONDS
        while self._pending and time.monotonic() < until and not self.have_ended():
            time.sleep(1)

    def errors(self) -> list[KdfastError]:
        """Return the errors of the jobs that have ended."""
        return self._errors

    def lost(self) -> str:
        """Return the jobs that ended without a result, with the files of their messages."""
        return "; ".join(self._lost)


class SlurmWorker:
    """What a job calls.

    submitit handles the signal that comes before the end of the time by queueing the job again at once. The worker puts
    that off until training has saved its state.

    Args:
        task: What the worker is given.
    """

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self) -> KdfastError | None:
        """Work; end the process if the job queues itself again."""
        stop = _Stop()
        try:
            error = work(self._task)
        except KeyboardInterrupt:
            error = Interrupted(f"stopped by {stop.received or 'SIGINT'}: run the same command again to resume")
        if stop.queue_again is not None and isinstance(error, Interrupted):
            stop.queue_again()
        return error

    def checkpoint(self) -> Any:
        """Return what the job calls when it runs again; called by submitit."""
        return _import_submitit().helpers.DelayedSubmission(self)


class _Stop:
    """Handlers of the signals that a job gets: training saves its state, other work ends at once.

    Attributes:
        received: Name of the first signal; training looks at it when it begins.
        queue_again: What submitit does at the end of the time; None before that.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.queue_again: Callable[[], None] | None = None
        signal.signal(signal.SIGTERM, self._stop)
        # The signal of the time limit is that which submitit has a handler for.
        self._limits = {n: h for n in (signal.SIGUSR1, signal.SIGUSR2) if callable(h := signal.getsignal(n))}
        for number in self._limits:
            signal.signal(number, self._out_of_time)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name
        raise KeyboardInterrupt

    def _out_of_time(self, number: int, frame: FrameType | None) -> None:
        handler = self._limits[signal.Signals(number)]
        self.queue_again = lambda: handler(number, None)
        signal.raise_signal(signal.SIGTERM)


def find_slurm() -> None:
    """Check that jobs can be submitted from here.

    Raises:
        UsageError: submitit is not installed, or this machine has no Slurm.
    """
    _import_submitit()
    if shutil.which("srun") is None:
        raise UsageError("`engine` is slurm, and this machine has no srun: run the command where sbatch works")


def sbatch_parameters(engine: EngineConfig, jobs: int) -> dict[str, Any]:
    """Return the parameters of submitit for an array of jobs."""
    return {
        "job_name": "kdfast",
        "cpus_per_task": engine.cpus,
        **({"gpus_per_node": int(engine.gpus)} if engine.gpus else {}),
        "array_parallelism": jobs,
        "additional_parameters": dict(engine.slurm_options),
    }


def _import_submitit() -> Any:
    try:
        import submitit
    except ImportError as error:
        raise UsageError("`engine` is slurm, which needs submitit: pip install 'kdfast[slurm]'") from error
    return submitit
