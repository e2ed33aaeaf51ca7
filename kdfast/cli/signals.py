"""SIGTERM and Ctrl-C end a command with exit code 75, whatever they interrupt.

The handler raises KeyboardInterrupt, so that temporary files are removed. Compiled code may swallow that exception or
replace it by another one, therefore the handler also records the signal: the command looks at the record whenever it
reports progress and when an exception ends it, and so does a training loop when it starts.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

# KdfastError is not imported: this file must be loaded before anything that takes time.
EXIT_CODE = 75
MESSAGE = "kdfast: interrupted; run the same command again to resume"

_IMPORT_SYSTEM = "<frozen importlib._bootstrap>"


class Interrupter:
    """The handler of both signals.

    Attributes:
        received: Name of the first signal that arrived, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None

    def install(self) -> None:
        """Handle both signals from now on, and forget earlier ones."""
        self.received = None
        for number in (signal.SIGTERM, signal.SIGINT):
            # A shell starts background jobs with Ctrl-C ignored.
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self)

    def ignore(self) -> None:
        """Ignore both signals from now on: the interpreter that shuts down would die of them after all work is done."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def exit(self) -> NoReturn:
        """Say that the command was interrupted, and exit."""
        self.ignore()
        if sys.stderr is not None and _speaks():
            with contextlib.suppress(OSError):
                print(MESSAGE, file=sys.stderr, flush=True)
        sys.exit(EXIT_CODE)

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise KeyboardInterrupt, or exit at once if a module is being imported."""
        self.received = self.received or signal.Signals(number).name
        if _is_importing(frame):
            # An exception here could leave a library half loaded; libraries also catch it. There is nothing to save.
            if _speaks():
                os.write(2, f"{MESSAGE}\n".encode())
            os._exit(EXIT_CODE)
        raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt again if a signal was received and the command still runs."""
        if self.received:
            raise KeyboardInterrupt


INTERRUPTER = Interrupter()


def _speaks() -> bool:
    """Return whether this process is the only one of a command, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORT_SYSTEM:
            return True
        frame = frame.f_back
    return False
