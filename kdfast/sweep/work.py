"""The loop of a sweep: whichever process, whichever invocation, takes the next row that nobody has."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Sequence
from typing import Any

from kdfast.errors import DivergedError, Interrupted
from kdfast.sweep.grid import Cell
from kdfast.sweep.results_log import Ledger
from kdfast.sweep.session import Session

# Seconds between two looks at what others have finished.
POLL = 0.3

OnRow = Callable[[dict[str, Any]], None]
Advance = Callable[[int, int, str], None]


def work(
    session: Session,
    cells: Sequence[Cell],
    ledger: Ledger,
    *,
    keep: bool,
    on_row: OnRow | None = None,
    advance: Advance | None = None,
) -> None:
    """Take rows until all are there, waiting for those that others have taken.

    Args:
        session: The sweep, opened.
        cells: Its rows.
        ledger: Where they go.
        keep: Leave the folder of every run.
        on_row: Told every row of this sweep as it comes, whoever made it.
        advance: Told (rows done, rows in all, what is going on).

    Raises:
        DivergedError: If runs diverged; all other rows are there.
        Interrupted: After SIGTERM or Ctrl-C, or when the process that started this one is gone; what is finished is
            kept.
        OutputError: If the folder cannot be written.
        DataError: If its results are not a sweep's.
    """
    diverged: dict[str, str] = {}
    seen = ledger.done()
    for cell in cells:
        # A kill between a row and the clearing of its run leaves the run behind.
        if cell.key in seen:
            with ledger.claim(cell.key) as mine:
                if mine:
                    session.clear(cell, ledger.folder, keep=keep)
    while left := [cell for cell in cells if cell.key not in seen | diverged.keys()]:
        took = False
        for cell in left:
            with ledger.claim(cell.key) as mine:
                if not mine or cell.key in ledger.done():
                    continue
                took = True
                note = _Note(cells, seen, cell, advance)
                try:
                    ledger.append(session.run(cell, ledger.folder, advance=note))
                    session.clear(cell, ledger.folder, keep=keep)
                except DivergedError as error:
                    diverged[cell.key] = f"{cell}: {error}"
                break
        seen = tell(ledger, cells, seen, on_row)
        if not took:
            _check_parent()
            time.sleep(POLL)
    if diverged:
        raise DivergedError(f"{len(diverged)} of {len(cells)} runs diverged: {'; '.join(diverged.values())}")


class _Note:
    """Turns a run's progress into the sweep's."""

    def __init__(self, cells: Sequence[Cell], seen: set[str], cell: Cell, advance: Advance | None) -> None:
        self._done = sum(other.key in seen for other in cells)
        self._total, self._cell, self._advance = len(cells), cell, advance

    def __call__(self, step: int, steps: int, note: str) -> None:
        _check_parent()
        if self._advance is not None:
            self._advance(self._done, self._total, f"{self._cell}: step {step}/{steps} {note}")


def tell(ledger: Ledger, cells: Sequence[Cell], seen: set[str], on_row: OnRow | None) -> set[str]:
    """Report the sweep's rows that have come since, and return the keys of all that are there."""
    wanted = {cell.key for cell in cells}
    rows = ledger.rows()
    for row in rows:
        if on_row is not None and row["key"] in wanted - seen:
            on_row(row)
    return {row["key"] for row in rows}


def _check_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise Interrupted("the command that started this process is gone; run it again")
