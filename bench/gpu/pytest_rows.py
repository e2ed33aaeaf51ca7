"""pytest plugin of the queue: one row for each test, and a new process after a test that hangs or breaks the device.

Tests with a row for the present sources are not run again. Under pytest-xdist each worker writes the rows of its tests,
and the process that distributes them asks for what the queue has to do.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from gpu.part import AGAIN
from gpu.results import PartResults, device_works

RESULTS = PartResults.from_environment()
LIMIT = float(os.environ.get("QUEUE_TEST_SECONDS", "100"))
_LENGTH = 3000  # characters of a failure that a row keeps
_LOST = "the CUDA context is lost: the remaining tests run in a new process"


class Rows:
    """Records outcomes.

    `lost` is set after a failure that the CUDA context did not survive, `unread` if a file cannot be imported.
    """

    def __init__(self) -> None:
        self.reports: list[pytest.TestReport] = []
        self.current = ""
        self.lost = self.unread = False
        self.known = RESULTS.measured()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Skip the tests that have a row; the workers of pytest-xdist must all collect the same tests."""
        for item in items:
            if item.nodeid in self.known:
                item.add_marker(pytest.mark.skip(reason="has a row"))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        """Run a test under a time limit, then write its row."""
        if item.nodeid in self.known:
            return (yield)
        self.reports, self.current = [], item.nodeid
        watchdog = threading.Timer(LIMIT, self.give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            done = yield
        finally:
            watchdog.cancel()
        self.record(item)
        self.current = ""
        return done

    @pytest.hookimpl(optionalhook=True)
    def pytest_handlecrashitem(self, crashitem: str, report: pytest.TestReport) -> None:
        """Write a row for a test that ended its worker, unless it did because it hung."""
        if crashitem not in RESULTS.measured():
            RESULTS.write(crashitem, outcome="failed", error=report.longreprtext[-_LENGTH:])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the reports of set-up, call and tear-down."""
        self.reports.append(report)

    def record(self, item: pytest.Item) -> None:
        """Write the row of a finished test."""
        seconds = round(sum(report.duration for report in self.reports), 2)
        failed = [report for report in self.reports if report.failed]
        skipped = [report for report in self.reports if report.skipped]
        if failed:
            self.lost = not device_works()
            RESULTS.write(item.nodeid, outcome="failed", seconds=seconds, error=failed[0].longreprtext[-_LENGTH:])
        elif skipped:
            RESULTS.write(item.nodeid, outcome="skipped", repeat=True, error=skipped[0].longreprtext[-_LENGTH:])
        else:
            RESULTS.write(item.nodeid, outcome="passed", seconds=seconds)
        if self.lost:
            item.session.shouldstop = _LOST

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write a row for a file that cannot be imported."""
        if report.failed:
            self.unread = True
            RESULTS.write(
                report.nodeid, outcome="failed", repeat=True, unread=True, error=report.longreprtext[-_LENGTH:]
            )

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Keep where a test was when the time was over, or that a worker's tests need a new process."""
        if _LOST in str(excinfo.value):
            self.lost = True
        if not self.current or self.lost:
            return
        error = str(excinfo.getrepr(style="short"))[-_LENGTH:]
        RESULTS.write(self.current, outcome="interrupted", repeat=True, error=error)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Ask the queue for a new process now, or for another try in its next run."""
        if self.unread or any(row.get("unread") and row["run"] == RESULTS.run for row in RESULTS.rows()):
            session.exitstatus = pytest.ExitCode.USAGE_ERROR
        if self.lost:
            session.exitstatus = AGAIN

    def give_up(self) -> None:
        """Record the test that runs for too long, with the stacks of all threads, and end the process."""
        with tempfile.TemporaryFile("w+") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read()
        RESULTS.write(self.current, outcome="hung", seconds=LIMIT, error=stacks[:_LENGTH])
        os._exit(AGAIN)


def pytest_configure(config: pytest.Config) -> None:
    """Register the hooks, and share the cores among the workers of pytest-xdist and what they start."""
    if workers := config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // workers)))
    config.pluginmanager.register(Rows(), "queue-rows")
