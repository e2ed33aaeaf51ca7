"""Runs of a sweep in threads of one process."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kdfast.distillation.plan import Plan
from kdfast.distillation.targets import CachedTargets
from kdfast.errors import DivergedError, Interrupted
from kdfast.files.interrupt import StopRequest
from kdfast.nets import build_net
from kdfast.nets.fit import draws_random_numbers
from kdfast.sweep import session as sessions
from kdfast.sweep.grid import SweepConfig
from kdfast.sweep.parallel.threads import can_train_in_threads, run_threads
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.run import choose_jobs
from kdfast.sweep.session import Session
from kdfast.sweep.spec import parse_methods
from kdfast.sweep.work import run_worker

KEY, OTHER = "0" * 64, "1" * 64


def open_session(tmp_path: Path, steps: int = 6, seeds: tuple[int, ...] = (0, 1, 2)) -> Session:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    images = rng.integers(0, 255, (60, 12, 12, 3), dtype=np.uint8)
    data = tmp_path / "data.npz"
    np.savez(data, train_images=images, train_labels=labels, test_images=images[:30], test_labels=labels[:30])
    settings = {"student": "resnet8", "batch_size": 10, "lr": 0.05, "schedule": "cosine"}
    return Session(SweepConfig(str(data), parse_methods("random"), (0.5,), (False,), seeds, steps, settings))


def rows_of(log: ResultsLog) -> dict[int, tuple[str, float, str]]:
    return {row["seed"]: (row["weights"], row["test_loss"], row["subset"]) for row in log.results()}


def new_log(folder: Path) -> ResultsLog:
    folder.mkdir()
    return ResultsLog(folder)


def test_rows_are_those_of_runs_one_after_the_other(tmp_path: Path) -> None:
    session = open_session(tmp_path)
    one, many = new_log(tmp_path / "one"), new_log(tmp_path / "many")
    run_worker(session, session.runs(), one, keep_runs=False)
    told: list[int] = []
    run_threads(session, session.runs(), many, jobs=3, keep_runs=False, on_row=lambda row: told.append(row["seed"]))
    assert rows_of(many) == rows_of(one)
    assert len({weights for weights, *_ in rows_of(one).values()}) == 3
    assert sorted(told) == [0, 1, 2]
    assert not list((tmp_path / "many" / "runs").iterdir())


def test_a_diverged_run_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = sessions.train

    def train(plan, folder, monitoring):
        if plan.config.seed == 1:
            raise DivergedError("the loss is not finite at step 1")
        return real(plan, folder, monitoring)

    monkeypatch.setattr(sessions, "train", train)
    session, log = open_session(tmp_path), new_log(tmp_path / "out")
    with pytest.raises(DivergedError, match="seed 1: the loss"):
        run_threads(session, session.runs(), log, jobs=2, keep_runs=False)
    assert sorted(rows_of(log)) == [0, 2]


def test_a_signal_stops_every_thread_with_its_state_saved(tmp_path: Path, terminate_when: Any) -> None:
    session, log = open_session(tmp_path, steps=100_000, seeds=(0, 1)), new_log(tmp_path / "out")
    terminate_when(lambda: sum(bool(file.read_bytes()) for file in log.folder.glob("runs/*/metrics.jsonl")) == 2)
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        run_threads(session, session.runs(), log, jobs=2, keep_runs=False)
    assert len(list(log.folder.glob("runs/*/checkpoints/latest.json"))) == 2
    StopRequest.check()  # the request has ended


def test_a_signal_stops_what_a_thread_does_between_runs() -> None:
    found: list[str] = []

    def work() -> None:
        try:
            StopRequest.check()
        except Interrupted as error:
            found.append(str(error))

    def in_a_thread() -> None:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()

    with StopRequest() as stop:
        in_a_thread()
        os.kill(os.getpid(), signal.SIGTERM)
        while not stop.signal_name:
            time.sleep(0.01)
        in_a_thread()
    assert found == ["stopped by SIGTERM: run the same command again to resume"]


def test_threads_claim_a_row_once(tmp_path: Path) -> None:
    log = new_log(tmp_path / "out")
    found: list[bool] = []

    def claim(key: str) -> None:
        with log.claim(key) as mine:
            found.append(mine)

    def in_a_thread(key: str) -> bool:
        thread = threading.Thread(target=claim, args=(key,))
        thread.start()
        thread.join()
        return found.pop()

    with log.claim(KEY) as mine:
        assert mine
        assert in_a_thread(OTHER), "and its end must not release the first claim"
        assert not in_a_thread(KEY)
    assert in_a_thread(KEY)


def test_networks_that_draw_are_known() -> None:
    net = build_net("resnet8", 10)
    assert not draws_random_numbers(net, "resnet8", (12, 12))
    before = torch.get_rng_state()
    dropout = torch.nn.Sequential(net, torch.nn.Dropout())
    assert draws_random_numbers(dropout, "dropout", (12, 12))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("device", "runs", "jobs"), [("cpu", 5, 3), ("cpu", 2, 2), ("cpu", 0, 1), ("cuda", 9, 4)])
def test_jobs_fit_the_device(device: str, runs: int, jobs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert choose_jobs(torch.device(device), runs) == jobs


def test_what_threads_cannot_share_rules_them_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "can_capture", lambda plan: True)
    plan = open_session(tmp_path)._plan_all(False)
    assert can_train_in_threads(plan)
    files: Any = SimpleNamespace(name="files")
    assert not can_train_in_threads(dataclasses.replace(plan, loader=files))
    targets = CachedTargets.__new__(CachedTargets)
    for head, expected in ((None, True), (object(), False)):
        targets.cache = SimpleNamespace(head=head)
        assert can_train_in_threads(dataclasses.replace(plan, targets=targets)) == expected


def test_a_cpu_has_no_threads_by_itself(tmp_path: Path) -> None:
    assert not open_session(tmp_path).divide_device(2)
