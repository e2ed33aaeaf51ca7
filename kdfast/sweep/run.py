"""Run a sweep: in this process, or in several."""

from __future__ import annotations

from pathlib import Path

from kdfast.files import check_writable
from kdfast.sweep.results_log import Ledger
from kdfast.sweep.session import Session
from kdfast.sweep.work import Advance, OnRow, work
from kdfast.sweep.workers import supervise


def run_sweep(
    session: Session,
    out: Path,
    *,
    jobs: int = 1,
    keep: bool = False,
    on_row: OnRow | None = None,
    advance: Advance | None = None,
) -> None:
    """Run every row of the sweep that is not there yet.

    Several processes and several calls at once share the rows between them. All return when every row is there.

    Args:
        session: The sweep, opened.
        out: Its folder; made when missing.
        jobs: Processes that train; with one it is this one.
        keep: Leave the folder of every run.
        on_row: Told every row of this sweep as it comes, whoever made it.
        advance: Told (rows done, rows in all, what is going on).

    Raises:
        DivergedError: If runs diverged; all other rows are there.
        Interrupted: After SIGTERM or Ctrl-C; what is finished is kept.
        OutputError: If the folder cannot be written.
        DataError: If the folder's results are not a sweep's.
    """
    cells, ledger = session.cells(), Ledger(out)
    ledger.rows()
    check_writable(out)
    if jobs == 1:
        work(session, cells, ledger, keep=keep, on_row=on_row, advance=advance)
    else:
        supervise(session.config, cells, ledger, jobs=jobs, keep=keep, on_row=on_row, advance=advance)
