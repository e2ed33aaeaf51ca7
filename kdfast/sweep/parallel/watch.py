"""Wait for workers, and report the rows that they write."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from kdfast.errors import DivergedError, Interrupted, KdfastError
from kdfast.progress import Progress
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.work import POLL_SECONDS, OnRow, Run, report_rows

# How long workers may clear up after the last row. Those that wait for a place on the cluster have nothing left to do.
_CLEAR_UP_SECONDS = 30.0


class Workers(Protocol):
    """Workers that an engine has started."""

    def describe(self) -> str:
        """Return what runs, such as "2 processes", for people."""

    def have_ended(self) -> bool:
        """Return whether all have ended."""

    def stop(self) -> None:
        """Let those that have not ended save their state, and wait for their end; do nothing if all have ended."""

    def errors(self) -> Sequence[KdfastError]:
        """Return the errors that workers have ended with so far."""

    def lost(self) -> str:
        """Return how workers ended that could return nothing, such as "exit code -9", or an empty text."""


def watch(
    workers: Workers,
    runs: Sequence[Run],
    log: ResultsLog,
    *,
    admit: Callable[[str], bool] | None = None,
    on_row: OnRow | None = None,
    progress: Progress | None = None,
    check: Callable[[], Any] | None = None,
) -> None:
    """Wait until the workers have ended.

    Args:
        workers: The workers.
        runs: The runs.
        log: The log of their rows.
        admit: As for `run_worker`: with it, workers may leave runs undone.
        on_row: Called with every new row of these runs.
        progress: Called with (rows done, rows total, status).
        check: Called now and then; the workers stop if it raises.

    Raises:
        DivergedError: Runs diverged; all other runs have their rows.
        KdfastError: The first other error of a worker; the others have saved their states.
        Interrupted: Workers were killed or stopped, and rows are missing; finished rows are kept.
    """
    done, complete = log.done(), None
    try:
        while not workers.have_ended() and not any(map(_is_final, workers.errors())):
            if check is not None:
                check()
            done = report_rows(log, runs, done, on_row)
            count = sum(run.key in done for run in runs)
            if progress is not None:
                progress(count, len(runs), _status(workers))
            if count == len(runs):
                complete = complete or time.monotonic()
                if time.monotonic() > complete + _CLEAR_UP_SECONDS:
                    break
            time.sleep(POLL_SECONDS)
    finally:
        workers.stop()
    done = report_rows(log, runs, done, on_row)
    missing = any(run.key not in done for run in runs)
    for error in sorted(workers.errors(), key=lambda error: (isinstance(error, Interrupted), not _is_final(error))):
        if missing or not isinstance(error, Interrupted):
            raise error
    if missing and (workers.lost() or admit is None):
        raise Interrupted(
            f"workers of this command ended early ({workers.lost() or 'no error'}): run the same command again to "
            "resume"
        )


def _status(workers: Workers) -> str:
    """Return what runs, and what has ended early; the others do its runs."""
    lost = workers.lost()
    return f"{workers.describe()}; ended early: {lost}" if lost else workers.describe()


def _is_final(error: KdfastError) -> bool:
    """Return whether an error ends the command; other workers go on after one of another kind."""
    return not isinstance(error, (DivergedError, Interrupted))
