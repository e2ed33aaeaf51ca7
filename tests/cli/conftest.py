import signal
import sys
from collections.abc import Callable
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


@pytest.fixture(autouse=True)
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
