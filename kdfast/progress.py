"""Type of the callbacks that report progress, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeAlias

# Called with (done, total, note).
Progress: TypeAlias = Callable[[int, int, str], None]


class Remaining:
    """Estimates the time left of work from its progress since the first report.

    What was done before the first report, as by an earlier process, does not count.

    Args:
        clock: Returns the time in seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: tuple[int, float] | None = None

    def update(self, done: int, total: int) -> float | None:
        """Return the seconds left, or None while they are unknown."""
        now = self._clock()
        if self._first is None or done < self._first[0]:
            self._first = done, now
        began, at = self._first
        return (total - done) * (now - at) / (done - began) if done > began else None
