import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORK = Path(__file__).parent / "work.py"
Start = Callable[..., list[subprocess.Popen[str]]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Yield a function that starts a Python command in several processes, as torchrun does but without watching."""
    started: list[subprocess.Popen[str]] = []

    def begin(processes: int, *command: object) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        group = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(processes)
        ]
        started.extend(group)
        return group

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


@pytest.fixture
def run_work(start: Start) -> Callable[..., None]:
    """Return a function that runs functions of `work.py` in several processes: processes, names, folder."""

    def run(processes: int, names: str, folder: Path) -> None:
        for process in start(processes, WORK, names, folder):
            _, errors = process.communicate(timeout=600)
            assert process.returncode == 0, errors

    return run
