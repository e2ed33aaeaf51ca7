"""The loop of one process of a sweep or a study: claim a run that has no row, run it, append its row."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from kdfast.errors import DivergedError, Interrupted
from kdfast.files.interrupt import StopRequest
from kdfast.progress import Progress
from kdfast.sweep.results_log import ResultsLog

POLL_SECONDS = 0.3

OnRow = Callable[[dict[str, Any]], None]


class Postponed(Exception):
    """Raised by `execute` where another process makes what the run needs; the run is tried again after others."""


class Run(Protocol):
    """What has one row; its text is its name for people."""

    @property
    def key(self) -> str:
        """SHA-256 (hexadecimal) of everything that determines the row."""


RunT = TypeVar("RunT", bound=Run)


class RunSession(Protocol[RunT]):
    """Opened inputs, and the execution of runs on them."""

    def runs(self) -> list[RunT]:
        """Return the runs in their order."""

    def execute(self, run: RunT, out: Path, *, progress: Progress | None = None) -> dict[str, Any]:
        """Return the row of a run, resumed if it was interrupted; raise Postponed if it cannot run yet."""

    def delete_checkpoints(self, run: RunT, out: Path, *, keep_runs: bool) -> None:
        """Delete what served to resume a run, once its row is written."""


def run_worker(
    session: RunSession[RunT],
    runs: Sequence[RunT],
    log: ResultsLog,
    *,
    keep_runs: bool,
    admit: Callable[[str], bool] | None = None,
    on_row: OnRow | None = None,
    progress: Progress | None = None,
) -> None:
    """Run what no other process runs, until every run has its row or is not admitted.

    Args:
        session: The opened inputs.
        runs: The runs.
        log: The log of their rows.
        keep_runs: Whether to keep the folder of every run.
        admit: Called with the key of a run that is to begin; whether it may. None: all may.
        on_row: Called with every new row of these runs, whichever process wrote it.
        progress: Called with (rows done, rows total, status).

    Raises:
        DivergedError: Runs diverged; all other runs have their rows.
        Interrupted: SIGTERM or Ctrl-C, or the process that started this one ended; finished rows are kept.
        OutputError: The folder cannot be written.
        DataError: results.jsonl is not that of a sweep.
    """
    diverged: dict[str, str] = {}
    refused: set[str] = set()
    done = log.done()
    for run in runs:
        # A process killed between appending a row and clearing its run leaves the run behind.
        if run.key in done:
            with log.claim(run.key) as claimed:
                if claimed:
                    session.delete_checkpoints(run, log.folder, keep_runs=keep_runs)
    while pending := [run for run in runs if run.key not in done | diverged.keys() | refused]:
        StopRequest.check()
        worked, looked = False, time.monotonic()
        for run in pending:
            if admit is not None and not admit(run.key):
                refused.add(run.key)
                continue
            with log.claim(run.key) as claimed:
                if not claimed or run.key in log.done():
                    continue
                report = _RunProgress(runs, done, run, progress)
                try:
                    log.append(session.execute(run, log.folder, progress=report))
                    session.delete_checkpoints(run, log.folder, keep_runs=keep_runs)
                except Postponed:
                    continue
                except DivergedError as error:
                    diverged[run.key] = f"{run}: {error}"
                worked = True
                break
        done = report_rows(log, runs, done, on_row)
        if not worked and any(run.key not in refused for run in pending):
            _check_parent()
            if progress is not None:
                progress(sum(run.key in done for run in runs), len(runs), "waits for other processes")
            # Looking at all runs takes time of the processes that work.
            time.sleep(max(POLL_SECONDS, 3 * (time.monotonic() - looked)))
    if diverged:
        raise DivergedError(f"{len(diverged)} of {len(runs)} runs diverged: {'; '.join(diverged.values())}")


class _RunProgress:
    """Report the progress of one run as progress of all."""

    def __init__(self, runs: Sequence[Run], done: set[str], run: Run, progress: Progress | None) -> None:
        self._done = sum(other.key in done for other in runs)
        self._total, self._run, self._progress = len(runs), run, progress

    def __call__(self, step: int, steps: int, note: str) -> None:
        _check_parent()
        if self._progress is not None:
            self._progress(self._done, self._total, f"{self._run}: step {step}/{steps} {note}")


def stoppable(progress: Progress | None) -> Progress:
    """Return a callback that stops the work it reports on where a thread was asked to; trainings stop by themselves."""

    def report(done: int, total: int, note: str) -> None:
        StopRequest.check()
        if progress is not None:
            progress(done, total, note)

    return report


def report_rows(log: ResultsLog, runs: Sequence[Run], done: set[str], on_row: OnRow | None) -> set[str]:
    """Report the rows of the runs whose keys are not in `done`, and return the keys of all rows."""
    new = {run.key for run in runs} - done
    rows = log.results()
    for row in rows:
        if on_row is not None and row["key"] in new:
            on_row(row)
    return {row["key"] for row in rows}


def _check_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise Interrupted("the command that started this process has ended: run it again to resume")
