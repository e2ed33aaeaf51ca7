"""Run a command under a time limit: SIGINT, which leaves a traceback, then SIGKILL."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        code: Its exit code; minus the number of the signal that ended it.
        seconds: Its duration.
        cut: Whether the time limit ended it.
    """

    code: int
    seconds: float
    cut: bool


def run(
    command: Sequence[str], log: Path, seconds: float, *, environment: dict[str, str], folder: Path, grace: float = 10
) -> Outcome:
    """Run a command in its own process group, with its output appended to a file.

    Args:
        command: Program and arguments.
        log: File for standard output and standard error.
        seconds: Limit, after which the group gets SIGINT.
        environment: All environment variables.
        folder: Working directory.
        grace: Seconds from SIGINT to SIGKILL.
    """
    started = time.monotonic()
    with open(log, "ab") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
            start_new_session=True,
            preexec_fn=_prepare,
        )
        try:
            code, cut = process.wait(seconds), False
        except subprocess.TimeoutExpired:
            code, cut = _stop(process, grace), True
        except BaseException:
            _stop(process, grace)
            raise
        finally:
            _signal(process, signal.SIGKILL)  # what the command left running
    return Outcome(code, time.monotonic() - started, cut)


def _stop(process: subprocess.Popen[bytes], grace: float) -> int:
    _signal(process, signal.SIGINT)
    try:
        return process.wait(grace)
    except subprocess.TimeoutExpired:
        _signal(process, signal.SIGKILL)
        return process.wait()


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _prepare() -> None:
    """Let the command heed SIGINT, which a shell's background ignores, and end when the queue is killed.

    A second queue then has the GPU to itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
