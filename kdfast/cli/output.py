"""Standard output and standard error: any text can be written, and what cannot be written is an error with its code.

Results go to the standard output, as text or with --json as one JSON object; everything else goes to the standard
error. With --quiet, only that object, warnings and errors are printed. Of several processes of a command, only the main
one prints, and whichever fails first says why.
"""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TextIO

from kdfast.errors import DataWarning, OutputError
from kdfast.text import printable

_show_with_place = warnings.showwarning


@dataclass
class Mode:
    """What the running command prints; set by its options.

    Attributes:
        as_json: Whether the result is printed as JSON.
        quiet: Whether progress and results in words are left out.
        log_json: Whether progress is written as JSON.
    """

    as_json: bool = False
    quiet: bool = False
    log_json: bool = False


MODE = Mode()
"""The mode of this process, which runs one command."""


def is_main_process() -> bool:
    """Return whether this is the only process of the command, or the main one of those that torchrun started."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def prepare_streams() -> None:
    """Let any character be written to any terminal, pipe or file, replace closed streams, and shorten warnings.

    A closed stream would give its number to the next file that is opened, and messages of libraries would go there.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the smallest free number
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    warnings.showwarning = show_warning


def say(text: str, *, flush: bool = False) -> None:
    """Print text to standard output; control characters in it, as in names of classes, appear as escapes.

    Raises:
        OutputError: It cannot be written.
    """
    if not is_main_process():
        return
    try:
        print(printable(text), flush=flush)
    except OSError as error:
        raise _not_written(error) from error


def show(text: str, facts: Mapping[str, Any]) -> None:
    """Print the result of the command: a text, or the facts as one JSON object.

    Args:
        text: The result in words.
        facts: The result as JSON values.

    Raises:
        OutputError: It cannot be written.
    """
    if MODE.as_json:
        say(json.dumps(facts, allow_nan=False))
    elif not MODE.quiet:
        say(text)


def note(text: str) -> None:
    """Print a part of the result that is known before its end, unless that is printed as JSON or not at all.

    Raises:
        OutputError: It cannot be written.
    """
    if not (MODE.as_json or MODE.quiet):
        say(text, flush=True)


def flush_output() -> None:
    """Write what standard output still holds.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        raise _not_written(error) from error


def complain(text: str) -> None:
    """Print one line to standard error, if that is possible; with --log-json, as an event."""
    if is_main_process():
        _write_line(text)


def complain_at_end(text: str) -> None:
    """Do the same with the line that says why the command ends; of several processes, the first to end prints it."""
    from kdfast.distributed.ending import is_first_to_end

    if is_first_to_end():
        _write_line(text)


def _write_line(text: str) -> None:
    line = " ".join(text.split())
    if MODE.log_json:
        log_event("message", text=printable(line))
    else:
        _print_error_line(printable(line))


def log_event(event: str, **fields: Any) -> None:
    """Write a line of --log-json: the kind of event, the time in seconds since 1970, and further JSON values."""
    _print_error_line(json.dumps({"event": event, "time": round(time.time(), 3), **fields}))


def _print_error_line(line: str) -> None:
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _discard(sys.stderr)


def show_warning(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
    """Replacement for `warnings.showwarning`: what a reader of data says is one line, without a place in the code."""
    if category.__name__ == "DecompressionBombWarning" or not is_main_process():
        return  # the reader of images refuses such an image
    if issubclass(category, DataWarning):
        complain(f"kdfast: {message}")
    else:
        _show_with_place(message, category, *where, **options)


def _not_written(error: OSError) -> OutputError:
    _discard(sys.stdout)
    return OutputError(f"cannot write to the standard output: {error.strerror or error}; results on disk are complete")


def _discard(stream: TextIO) -> None:
    """Let the interpreter's last flush of a stream succeed, whose failure would change the exit code."""
    try:
        number = stream.fileno()
    except (OSError, ValueError):
        return
    void = os.open(os.devnull, os.O_WRONLY)
    os.dup2(void, number)
    os.close(void)
