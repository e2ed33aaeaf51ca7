"""Progress of long work, on the standard error, so that the standard output holds only results.

A terminal gets a bar. Elsewhere, as in the log of a job, progress is a line every few seconds, and with --log-json a
JSON object per line.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from kdfast.cli.output import MODE, complain, is_main_process, log_event
from kdfast.cli.signals import INTERRUPTER
from kdfast.progress import Remaining
from kdfast.text import printable

# Seconds before the first line, so that a quick command writes none, and between two, for people and for programs.
FIRST_SECONDS = 1.0
LINE_SECONDS = 10.0
JSON_SECONDS = 1.0

# Work that is announced before it starts.
LARGE_BYTES, LONG_SECONDS = 100_000_000, 60.0


class Reporter:
    """Shows the progress of one command; a function of (done, total, note).

    Every call raises KeyboardInterrupt if a signal was received and the command still runs.

    Args:
        draw: Called with (done, total, note) at every call.
        write: Called with a line that is shown at once.
    """

    def __init__(self, draw: Callable[[int, int, str], None], write: Callable[[str], None]) -> None:
        self._draw, self._write = draw, write

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Show how much is done."""
        self._draw(done, total, note)
        INTERRUPTER.check()

    def say(self, text: str) -> None:
        """Show a line about the work, such as where it resumes."""
        self._write(text)


@contextlib.contextmanager
def progress(label: str, *, shown: bool = True) -> Iterator[Reporter]:
    """Yield what shows the progress of the work inside, in the main process of a command.

    Args:
        label: Name of the work.
        shown: Whether to show it.
    """
    if not (shown and is_main_process()) or (MODE.quiet and not MODE.log_json):
        yield Reporter(lambda done, total, note: None, lambda text: None)
    elif MODE.log_json:
        lines = _Lines(JSON_SECONDS)
        yield Reporter(
            lambda done, total, note: lines.add(done, total, _json_line(label, note)),
            lambda text: log_event("note", work=label, note=text),
        )
    elif sys.stderr.isatty():
        with _bar(label) as reporter:
            yield reporter
    else:
        lines = _Lines(LINE_SECONDS)
        yield Reporter(
            lambda done, total, note: lines.add(done, total, _text_line(label, note)),
            lambda text: complain(f"{label}: {text}"),
        )


def announce(
    out: Path, size: int, seconds: float | None, *, files: Mapping[str, int] | None = None, temporary: int = 0
) -> None:
    """Check that the disk has room for an output, and say what long work will write and how long it takes.

    Args:
        out: The folder to write.
        size: Its bytes, at least roughly.
        seconds: The estimated time, or None if it is short.
        files: The bytes of its files by name, to name them too.
        temporary: Bytes that are only needed until it is finished.

    Raises:
        OutputError: The disk is too small.
    """
    from kdfast.files.space import check_space, format_bytes, free_space

    check_space(out, size + temporary, "the output")
    if MODE.quiet or (size < LARGE_BYTES and (seconds or 0.0) < LONG_SECONDS):
        return
    takes = "" if seconds is None else f", in about {format_seconds(seconds)}"
    room = f"{list_files(files)}; " if files else ""
    room += f"{format_bytes(free_space(out))} free"
    complain(f"kdfast: writes about {format_bytes(size)} to {out} ({room}){takes}")


def list_files(files: Mapping[str, int]) -> str:
    """Return names of files with their sizes."""
    from kdfast.files.space import format_bytes

    return ", ".join(f"{name} {format_bytes(size)}" for name, size in files.items())


class _Lines:
    """Writes progress as lines: the first after `FIRST_SECONDS`, then one every few seconds, and one at the end.

    Args:
        seconds: The least time between two lines.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._written = seconds, time.monotonic()
        self._any = self._ended = False
        self._remaining = Remaining(time.monotonic)

    def add(self, done: int, total: int, write: Callable[[int, int, float | None], None]) -> None:
        """Call `write` with (done, total, seconds left) if it is time for a line."""
        left = self._remaining.update(done, total)
        now = time.monotonic()
        wait = self._seconds if self._any else FIRST_SECONDS
        ended = done >= total
        if now - self._written >= wait or (ended and self._any and not self._ended):
            self._written, self._any = now, True
            write(done, total, left)
        self._ended = ended  # workers that have nothing left to do are still polled


def _json_line(label: str, note: str) -> Callable[[int, int, float | None], None]:
    return lambda done, total, left: log_event(
        "progress",
        work=label,
        done=done,
        total=total,
        seconds_left=None if left is None else round(left, 1),
        note=note,
    )


def _text_line(label: str, note: str) -> Callable[[int, int, float | None], None]:
    def write(done: int, total: int, left: float | None) -> None:
        parts = [f"{label}: {done}/{total}", note, f"{format_seconds(left)} left" if left else ""]
        complain(", ".join(filter(None, parts)))

    return write


def format_seconds(seconds: float) -> str:
    """Return a time as `S s`, `M min` or `H h M min`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


@contextlib.contextmanager
def _bar(label: str) -> Iterator[Reporter]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    note_column = TextColumn("{task.fields[note]}", markup=False)
    with Progress(*columns, note_column, console=Console(stderr=True)) as bar:
        task = bar.add_task(label, total=None, note="")

        def draw(done: int, total: int, note: str) -> None:
            bar.update(task, completed=done, total=total, note=printable(note))

        yield Reporter(draw, lambda text: bar.console.print(printable(f"{label}: {text}"), markup=False))
