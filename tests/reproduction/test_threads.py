"""The runs of a study in threads of one process, with teachers, dynamics and caches that they make and share."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from kdfast.distillation.cuda_graph import EXCLUSIVE
from kdfast.errors import Interrupted
from kdfast.files import schemas
from kdfast.reproduction.engine import artifacts
from kdfast.reproduction.engine import run as engine
from kdfast.reproduction.engine.config import ReproductionConfig
from kdfast.reproduction.engine.session import ReproductionSession
from kdfast.reproduction.study_file import load_study
from kdfast.sweep.parallel.threads import run_threads
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.work import run_worker

STUDY = """
title: Tiny
source: Nobody
recipe: {epochs: 4, batch_size: 15, lr: 0.05, views: 3}
defaults: {student: resnet8}
cells:
  - {fraction: 0.5, kd: off, method: [random, forgetting]}
  - {fraction: 0.5, teacher: resnet8, alpha: [0.5, 1]}
  - {fraction: 1.0, teacher: resnet8, match_steps_of: 0.5}
order: [alpha]
dynamics: {epochs: 2, batch_size: 20}
"""


def open_session(tmp_path: Path, out: str, **settings: Any) -> ReproductionSession:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = rng.integers(0, 255, (60, 12, 12, 3), dtype=np.uint8)
    test = {"test_images": images[:30], "test_labels": labels[:30]}
    np.savez(tmp_path / "data.npz", train_images=images, train_labels=labels, **test)
    (tmp_path / "tiny.yaml").write_text(settings.pop("text", STUDY))
    study = load_study(str(tmp_path / "tiny.yaml"))
    (tmp_path / out).mkdir(exist_ok=True)
    data = str(tmp_path / "data.npz")
    return ReproductionSession(ReproductionConfig(study, study.cells, (0,), data, tmp_path / out, **settings))


def new_log(session: ReproductionSession) -> ResultsLog:
    log = ResultsLog(session.config.out, schemas.StudyRow, "study")
    log.begin()
    return log


def rows_of(log: ResultsLog) -> dict[str, tuple[Any, ...]]:
    return {row["key"]: (row["weights"], row["test_top1"], row["subset"], row["teacher_top1"]) for row in log.results()}


@pytest.fixture
def unlocked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Modules that a thread makes or calls without the lock, which fills while the test runs."""
    found: list[str] = []

    def watch(name: str) -> None:
        real = getattr(nn.Module, name)

        def method(module: nn.Module, *arguments: Any, **options: Any) -> Any:
            if threading.current_thread() is not threading.main_thread() and not EXCLUSIVE._is_owned():
                found.append(f"{type(module).__name__}.{name}")
            return real(module, *arguments, **options)

        monkeypatch.setattr(nn.Module, name, method)

    watch("__init__")
    watch("__call__")
    return found


def test_rows_are_those_of_runs_one_after_the_other(tmp_path: Path, unlocked: list[str]) -> None:
    one, many = open_session(tmp_path, "one"), open_session(tmp_path, "many")
    run_worker(one, one.runs(), new_log(one), keep_runs=False)
    run_threads(many, many.runs(), new_log(many), jobs=3, keep_runs=False)
    expected = rows_of(new_log(one))
    assert len({weights for weights, *_ in expected.values()}) == len(one.runs()) == 5
    assert rows_of(new_log(many)) == expected
    for folder in ("runs", "caches"):
        assert not list((tmp_path / "many" / folder).iterdir()), f"no run needs these {folder} any more"
    assert not unlocked


def test_a_signal_stops_the_making_of_a_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, terminate_when: Any
) -> None:
    begun = threading.Event()
    real = artifacts.build_cache

    def slow(*arguments: Any, progress: Any, **options: Any) -> Any:
        begun.set()
        while True:  # until the request to stop reaches it
            progress(0, 1, "cached")
            begun.wait(0.01)

    monkeypatch.setattr(artifacts, "build_cache", slow)
    session = open_session(tmp_path, "out")
    log = new_log(session)
    terminate_when(begun.is_set)
    with pytest.raises(Interrupted, match="SIGTERM"):
        run_threads(session, session.runs(), log, jobs=2, keep_runs=False)
    monkeypatch.setattr(artifacts, "build_cache", real)
    run_threads(session, session.runs(), log, jobs=2, keep_runs=False)
    assert len(rows_of(log)) == 5


NETWORK = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(432, 8), nn.Dropout(), nn.Linear(8, classes))
"""


class Chosen(Exception):
    """Raised by what would train."""


@pytest.mark.parametrize(
    ("student", "precision", "expected"),
    [("resnet8", "bf16", "threads"), ("resnet8", "fp16", "processes"), ("dropout.py:Net", "bf16", "processes")],
)
def test_on_a_gpu_runs_are_threads_unless_their_steps_rule_that_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, student: str, precision: str, expected: str
) -> None:
    (tmp_path / "dropout.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    session = open_session(tmp_path, "out", text=STUDY.replace("student: resnet8", f"student: {student}"))
    session.config = dataclasses.replace(session.config, precision=precision)
    session.device = torch.device("cuda")
    monkeypatch.setattr(engine, "run_threads", fail_with("threads"))
    monkeypatch.setattr(engine, "run_workers", fail_with("processes"))
    timed: list[int] = []
    monkeypatch.setattr(engine, "make_budget", lambda session, runs, log, deadline, jobs: timed.append(jobs))
    with pytest.raises(Chosen, match=expected):
        engine.run_study(session, new_log(session), jobs=2, budget_seconds=60)
    assert timed == [{"threads": 1, "processes": 2}[expected]], "processes divide the threads of the CPU"


def fail_with(text: str) -> Any:
    def fail(*arguments: Any, **options: Any) -> None:
        raise Chosen(text)

    return fail


def test_a_cpu_has_no_threads_by_itself(tmp_path: Path) -> None:
    assert not open_session(tmp_path, "out").divide_device(2)
