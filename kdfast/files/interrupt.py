"""Record SIGTERM and Ctrl-C in a flag that a loop checks after each step, to save its state and stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, ClassVar

from kdfast.errors import Interrupted


class StopRequest:
    """Context manager inside which the first SIGTERM or SIGINT only sets `signal_name`; a second one acts as usual.

    Outside the main thread, where Python allows no signal handlers, it is that of the request that the main thread was
    in when the block began, if any.
    """

    _of_main_thread: ClassVar[StopRequest | None] = None

    def __init__(self) -> None:
        self._received: str | None = None
        self._around: StopRequest | None = None
        self._previous: dict[signal.Signals, Any] = {}

    @property
    def signal_name(self) -> str | None:
        """Name of the first signal; None if none arrived."""
        return self._received or (None if self._around is None else self._around.signal_name)

    @classmethod
    def check(cls) -> None:
        """Raise if the main thread is inside a request that a signal has reached, for work of other threads.

        Raises:
            Interrupted: Names the signal.
        """
        name = None if cls._of_main_thread is None else cls._of_main_thread.signal_name
        if name is not None:
            raise Interrupted(f"stopped by {name}: run the same command again to resume")

    def __enter__(self) -> StopRequest:
        self._around = StopRequest._of_main_thread
        if threading.current_thread() is threading.main_thread():
            StopRequest._of_main_thread = self
            for kind in (signal.SIGTERM, signal.SIGINT):
                previous = self._previous[kind] = signal.signal(kind, self._on_signal)
                # The handler before this one may have recorded a signal whose exception was swallowed.
                self._received = self._received or getattr(previous, "received", None)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for kind, handler in self._previous.items():
            signal.signal(kind, handler)
        self._previous = {}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        if StopRequest._of_main_thread is self:
            StopRequest._of_main_thread = self._around
