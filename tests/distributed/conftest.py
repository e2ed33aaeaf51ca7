import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT = 900  # seconds of a process
Start = Callable[..., list[subprocess.Popen[str]]]
RunAll = Callable[..., list[tuple[int, str, str]]]

# Forks the processes, which then need not import torch: that takes longer than what they do. A line of input holds, for
# each of them, its variables, its files of output and its command: that of kdfast, or functions of work.py.
FORKS = """
import json, os, signal, sys
import torch._dynamo, torch.distributed.nn
import kdfast.cli.program, work
for line in sys.stdin:
    pids = []
    for variables, files, limit, command in json.loads(line):
        pids.append(os.fork())
        if pids[-1] == 0:
            signal.alarm(limit)
            os.environ.update(variables)
            for number, path in enumerate((os.devnull, *files)):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
            sys.argv = command
            kdfast.cli.main() if command[0] == "kdfast" else work.main()
            sys.exit()
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), flush=True)
"""


def launched(processes: int) -> list[dict[str, str]]:
    """Return the variables that torchrun sets for each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**shared, "RANK": rank, "LOCAL_RANK": rank} for rank in range(processes)]
    return [{name: str(value) for name, value in variables.items()} for variables in ranks]


@pytest.fixture(scope="session")
def run_all(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunAll]:
    """Yield a function that runs a command in several processes: variables of each, command -> code, out, err of each.

    The command is that of kdfast, or `work` with functions of work.py.
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    with subprocess.Popen([sys.executable, "-c", FORKS], env=variables, **pipes) as process:

        def run(environments: list[dict[str, str]], *command: object) -> list[tuple[int, str, str]]:
            folder = tmp_path_factory.mktemp("processes")
            files = [(folder / f"out-{i}", folder / f"err-{i}") for i in range(len(environments))]
            asked = [
                (environment, [*map(str, pair)], LIMIT, [*map(str, command)])
                for environment, pair in zip(environments, files, strict=True)
            ]
            process.stdin.write(json.dumps(asked) + "\n")
            process.stdin.flush()
            codes = json.loads(process.stdout.readline())
            return [(code, out.read_text(), err.read_text()) for code, (out, err) in zip(codes, files, strict=True)]

        yield run
        process.stdin.close()


@pytest.fixture
def run_work(run_all: RunAll) -> Callable[..., None]:
    """Return a function that runs functions of `work.py` in several processes: processes, names, folder."""

    def run(processes: int, names: str, folder: Path) -> None:
        for code, _, errors in run_all(launched(processes), "work", names, folder):
            assert code == 0, errors

    return run


@pytest.fixture
def start() -> Iterator[Start]:
    """Yield a function that starts a Python command in several processes, as torchrun does but without watching."""
    started: list[subprocess.Popen[str]] = []

    def begin(processes: int, *command: object) -> list[subprocess.Popen[str]]:
        group = [
            subprocess.Popen(
                [sys.executable, *map(str, command)],
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for variables in launched(processes)
        ]
        started.extend(group)
        return group

    yield begin
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()
