"""Progress bars for long work: on stderr, so that stdout holds only results, and only on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from kdfast.progress import Progress


@contextlib.contextmanager
def progress(label: str, *, shown: bool = True) -> Iterator[Progress]:
    """Yield a function of (done, total, note) that draws a bar; it does nothing if stderr is not a terminal.

    Args:
        label: Title of the bar.
        shown: Whether to draw the bar; False in all processes of a run but the main one.
    """
    if not (shown and sys.stderr.isatty()):
        yield _silent
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with ProgressBar(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total, note=note)

        yield report


def _silent(done: int, total: int, note: str = "") -> None:
    """Draw nothing."""
