"""Seconds of work that is repeated for a while."""

from __future__ import annotations

import time
from collections.abc import Callable

_WARM_SHARE = 0.2  # of the time; caches, allocators and clocks settle in the first calls


def mean_seconds(measure: Callable[[], float], budget: float) -> float:
    """Return the mean of what `measure` returns, from calls over about `budget` seconds.

    The first calls are discarded: at least one, and those within the first fifth of the time. The mean, not the
    median, because what disturbs the machine now and then disturbs long work as often.

    Args:
        measure: Does a piece of work and returns its seconds.
        budget: Seconds for all calls; at least two are made.
    """
    started = time.perf_counter()
    while True:
        measure()
        if time.perf_counter() - started >= _WARM_SHARE * budget:
            break
    found = [measure()]
    while time.perf_counter() - started < budget:
        found.append(measure())
    return sum(found) / len(found)


def seconds_of(work: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


class Enough(Exception):
    """Ends work that a `Stopwatch` has seen enough of."""


class Stopwatch:
    """A callback of progress that measures work by its own reports, and ends it when the time is up.

    The work up to the first report is discarded.

    Args:
        budget: Seconds after which the next report raises `Enough`, if there were at least two.

    Attributes:
        total: The total of the last report.
    """

    def __init__(self, budget: float) -> None:
        self._budget = budget
        self._started = time.perf_counter()
        self._reports: list[tuple[float, int]] = []
        self.total = 0

    def __call__(self, done: int, total: int, note: str) -> None:
        """Take a report.

        Raises:
            Enough: The time is up.
        """
        now = time.perf_counter()
        self._reports.append((now, done))
        self.total = total
        if now - self._started >= self._budget and len(self._reports) > 1:
            raise Enough

    @property
    def seconds_per_unit(self) -> float | None:
        """Seconds of a unit of `done`; None with fewer than two reports."""
        if len(self._reports) < 2 or self._reports[-1][1] == self._reports[0][1]:
            return None
        (first, before), (last, after) = self._reports[0], self._reports[-1]
        return (last - first) / (after - before)
