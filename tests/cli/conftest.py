import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from kdfast import cli


class Outcome(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Outcome]


@pytest.fixture(autouse=True, scope="session")
def heed_interrupts() -> None:
    """Let processes that tests start heed SIGINT, which a shell makes those in its background ignore."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def kdfast(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the command in this process: arguments -> exit code, stdout, stderr."""

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kdfast", *map(str, arguments)])
        capsys.readouterr()
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


# Forks a process for each command, which then need not import torch: that takes longer than the commands themselves.
# It has one thread and has run nothing, as if each command had just imported the modules.
FORKS = """
import json, os, sys
import torch._dynamo  # by the first step of an optimizer
import kdfast.cli.program, kdfast.distillation.record_dynamics, kdfast.distillation.train, kdfast.pruning.select
import kdfast.sweep.run, kdfast.teacher.build, kdfast.teacher.flatten
for line in sys.stdin:
    asked = json.loads(line)
    if isinstance(asked, int):
        pid, status = os.waitpid(asked, os.WNOHANG)
        answer = os.waitstatus_to_exitcode(status) if pid else None
    else:
        answer = os.fork()
        if answer == 0:
            os.setsid()
            for number, path in enumerate((os.devnull, *asked[:2])):
                os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
            sys.argv = ["kdfast", *asked[2:]]
            kdfast.cli.main()
    print(json.dumps(answer), flush=True)
"""


class Forked:
    """A command in a process and session of its own; with those methods of `Popen` that tests need."""

    def __init__(self, ask: Callable[[object], int | None], folder: Path, arguments: tuple[object, ...]) -> None:
        self.ask, self.files = ask, (folder / "out", folder / "err")
        self.returncode: int | None = None
        self.pid = ask([*map(str, self.files), *map(str, arguments)])

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.ask(self.pid)
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("kdfast", timeout)
            time.sleep(0.01)
        return self.returncode

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        self.wait(timeout)
        return self.files[0].read_text(), self.files[1].read_text()

    def kill(self, number: int = signal.SIGKILL) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


@pytest.fixture(scope="session")
def fork(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Forked]]:
    """Return a function that starts a command in another process: arguments -> `Forked`."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    started: list[Forked] = []
    with subprocess.Popen([sys.executable, "-c", FORKS], **pipes) as process:

        def ask(question: object) -> int | None:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        def start(*arguments: object) -> Forked:
            started.append(Forked(ask, tmp_path_factory.mktemp("forked"), arguments))
            return started[-1]

        yield start
        for command in started:
            command.kill()
            command.wait()
        process.stdin.close()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz of 3 classes that a network learns in a few steps: 120 training and 60 test images of 12 x 12."""
    rng = np.random.default_rng(0)

    def split(n: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(n, dtype=np.int64) % 3
        images = rng.integers(0, 60, (n, 12, 12, 3), dtype=np.uint8)
        images[np.arange(n), :, :, labels] += 150
        return images, labels

    train, test = split(120), split(60)
    path = tmp_path_factory.mktemp("tiny") / "tiny.npz"
    np.savez(path, train_images=train[0], train_labels=train[1], test_images=test[0], test_labels=test[1])
    return path


@pytest.fixture(scope="session")
def teacher(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher trained on the tiny data."""
    from kdfast.device import resolve_device
    from kdfast.distillation.config import RunConfig
    from kdfast.distillation.folder import RunFolder
    from kdfast.distillation.inputs import InputPaths, plan_run
    from kdfast.distillation.train import train

    folder = tmp_path_factory.mktemp("teacher") / "run"
    config = RunConfig("resnet8", epochs=3, batch_size=20, lr=0.05, schedule="cosine")
    plan = plan_run(InputPaths(str(tiny)), config, device=resolve_device("cpu"))
    with RunFolder(folder, plan.identity) as claimed:
        train(plan, claimed)
    return folder / "student.pt"


@pytest.fixture(scope="session")
def cache(tiny: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of that teacher with three views of every sample."""
    from kdfast.data.readers.registry import open_source
    from kdfast.nets.checkpoint import load_model
    from kdfast.teacher.build import build_cache

    out = tmp_path_factory.mktemp("cache") / "cache"
    build_cache(open_source(tiny), load_model(teacher), out, n_views=3)
    return out


@pytest.fixture(scope="session")
def finished(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a student on the tiny data, with its checkpoints; copy it to change it."""
    from kdfast.device import resolve_device
    from kdfast.distillation.config import RunConfig
    from kdfast.distillation.folder import RunFolder
    from kdfast.distillation.inputs import InputPaths, plan_run
    from kdfast.distillation.train import Monitoring, train

    folder = tmp_path_factory.mktemp("finished") / "run"
    config = RunConfig("resnet8", epochs=1, batch_size=40)
    plan = plan_run(InputPaths(str(tiny)), config, alpha="0", device=resolve_device("cpu"))
    with RunFolder(folder, plan.identity, metadata=plan.metadata) as claimed:
        train(plan, claimed, Monitoring(keep_checkpoints=True))
    return folder
