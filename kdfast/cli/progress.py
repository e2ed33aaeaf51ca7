"""Progress bars for long work: on stderr, so that stdout holds only results, and only on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from kdfast.cli.signals import INTERRUPTER
from kdfast.progress import Progress
from kdfast.text import printable


@contextlib.contextmanager
def progress(label: str, *, shown: bool = True) -> Iterator[Progress]:
    """Yield a function of (done, total, note) that draws a bar; no bar if stderr is not a terminal.

    The function also raises KeyboardInterrupt if a signal was received and the command still runs.

    Args:
        label: Title of the bar.
        shown: Whether to draw the bar; False in all processes of a run but the main one.
    """
    if not (shown and sys.stderr.isatty()):
        yield _check_interrupt
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, TextColumn("{task.fields[note]}", markup=False), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=printable(note))
            INTERRUPTER.check()

        yield report


def _check_interrupt(done: int, total: int, note: str = "") -> None:
    """Draw nothing; end the command if a signal was swallowed."""
    INTERRUPTER.check()
