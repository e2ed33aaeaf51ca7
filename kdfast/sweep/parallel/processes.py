"""Workers in processes of this machine."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from kdfast.errors import KdfastError
from kdfast.sweep.parallel.worker import Task, work


class Processes:
    """Processes that each call `kdfast.sweep.parallel.worker.work`.

    Args:
        task: What each is given.
        jobs: Number of processes.
    """

    def __init__(self, task: Task, jobs: int) -> None:
        # A forked process would inherit torch's threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        self._returned = context.SimpleQueue()
        self._errors: list[KdfastError] = []
        self._processes = [
            context.Process(target=_work_in_process, args=(task, self._returned), name=f"worker-{k}")
            for k in range(jobs)
        ]
        try:
            with _ctrl_c_ignored():
                for process in self._processes:
                    process.start()
        except BaseException:
            self.stop()
            raise

    def describe(self) -> str:
        """Return how many processes have not ended."""
        alive = sum(process.is_alive() for process in self._processes)
        return "1 process" if alive == 1 else f"{alive} processes"

    def have_ended(self) -> bool:
        """Return whether no process is alive."""
        return not any(process.is_alive() for process in self._processes)

    def stop(self) -> None:
        """Send SIGTERM to those that are alive, and wait for them."""
        for process in self._processes:
            if process.pid is not None:
                process.terminate()
                process.join()

    def errors(self) -> list[KdfastError]:
        """Return the errors that processes have put into the queue so far."""
        while not self._returned.empty():
            self._errors.append(self._returned.get())
        return self._errors

    def lost(self) -> str:
        """Return the exit codes other than 0."""
        codes = [process.exitcode for process in self._processes if process.exitcode]
        name = "exit code" if len(codes) == 1 else "exit codes"
        return f"{name} {', '.join(map(str, codes))}" if codes else ""


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    """Let processes started in the block ignore Ctrl-C from their first moment; SIGTERM stops them, once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _work_in_process(task: Task, returned: Any) -> None:
    # Ctrl-C in a terminal signals the whole process group, and training aborts on a second signal: get only SIGTERM.
    os.setsid()
    error = work(task)
    if error is not None:
        returned.put(error)
