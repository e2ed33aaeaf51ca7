"""Record SIGTERM and Ctrl-C in a flag that a loop checks after each step, to save its state and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """Context manager inside which the first SIGTERM or SIGINT only sets `signal_name`; a second one acts as usual.

    Outside the main thread, where Python allows no signal handlers, `signal_name` stays None.
    """

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for kind in (signal.SIGTERM, signal.SIGINT):
                previous = self._previous[kind] = signal.signal(kind, self._on_signal)
                # The handler before this one may have recorded a signal whose exception was swallowed.
                self.signal_name = self.signal_name or getattr(previous, "received", None)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
        self._previous = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
