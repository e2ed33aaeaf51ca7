"""Settings of engines, what workers on other machines check, and the loop that watches workers."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdfast.errors import DivergedError, Interrupted, KdfastError, OutputError, UsageError
from kdfast.sweep.parallel import engine as engines
from kdfast.sweep.parallel.command import check_locks, running_command
from kdfast.sweep.parallel.engine import EngineConfig, choose_engine
from kdfast.sweep.parallel.processes import Processes
from kdfast.sweep.parallel.ray_tasks import RayTasks
from kdfast.sweep.parallel.watch import watch
from kdfast.sweep.parallel.worker import Task
from kdfast.sweep.results_log import ResultsLog

KEYS = ["a" * 64, "b" * 64]


@pytest.mark.parametrize(
    ("device", "given", "expected"),
    [
        ("auto", {}, ("cpu", 1, 0)),
        ("cpu", {"cpus_per_job": 4}, ("cpu", 4, 0)),
        ("cuda", {}, ("cuda", 1, 1)),
        ("auto", {"gpus_per_job": 0.25}, ("cuda", 1, 0.25)),
        ("auto", {"gpus_per_job": 0}, ("cpu", 1, 0)),
    ],
)
def test_ray_workers_have_the_resources_of_their_device(device: str, given: dict, expected: tuple) -> None:
    engine = choose_engine("ray", device, **given)
    assert (engine.device, engine.cpus, engine.gpus) == expected
    assert engine.device_here == "cpu"
    assert engine.ray_address == "auto"


def test_a_gpu_here_means_gpus_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "resolve_device", lambda name: SimpleNamespace(type="cuda"))
    assert choose_engine("ray", "auto").gpus == 1
    assert choose_engine("ray", "cpu").gpus == 0


def test_options_of_slurm_may_give_the_gpus() -> None:
    engine = choose_engine("slurm", "auto", slurm_options={"time": "60", "gres": "gpu:a100:1"})
    assert (engine.device, engine.gpus) == ("cuda", 0)


def test_a_local_engine_is_where_its_device_is() -> None:
    assert choose_engine("local", "cpu") == EngineConfig()
    assert EngineConfig(device="cuda:1").device_here == "cuda:1"


def test_a_worker_does_what_its_command_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/of/the/command", *sys.path])
    log = ResultsLog(Path("out"))
    log.folder.mkdir()
    with running_command(log, KEYS) as command:
        monkeypatch.chdir("/")
        monkeypatch.setattr(sys, "path", sys.path[1:])
        command.enter()
        assert Path.cwd() == tmp_path
        assert "/of/the/command" in sys.path
        command.check_keys(reversed(KEYS))
        with pytest.raises(UsageError, match=r"the runs of \S+ differ .* the same data at the same path"):
            command.check_keys(KEYS[:1])
        other = dataclasses.replace(command, versions=("0.0.1", "1.0"))
        with pytest.raises(UsageError, match=r"has kdfast \S+ with torch .*, and the command has 0\.0\.1 with 1\.0"):
            other.enter()
        check_locks(command)
    assert [path.name for path in log.folder.iterdir()] == [".claims"]


def test_a_worker_without_the_folder_is_refused(tmp_path: Path) -> None:
    here = os.getcwd()
    log = ResultsLog(tmp_path / "out")
    log.folder.mkdir()
    with running_command(log, KEYS) as command:
        nowhere = dataclasses.replace(command, folder=str(tmp_path / "nowhere"))
        with pytest.raises(OutputError, match=r"has no folder .*nowhere .*a file system that all machines share"):
            nowhere.enter()
        log.folder.rename(tmp_path / "of another machine")
        log.folder.mkdir()
        with pytest.raises(OutputError, match=r"has another folder at .*out: use a folder of a file system"):
            command.enter()
    assert os.getcwd() == here


@pytest.mark.parametrize("kind", ["flock", "claim"])
def test_locks_that_other_machines_do_not_see_are_found(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ResultsLog(tmp_path)
    with running_command(log, KEYS) as command:
        with monkeypatch.context() as patch:  # as with a file system whose locks hold on one machine alone
            if kind == "flock":
                patch.setattr("fcntl.flock", lambda *_: None)
            else:
                patch.setattr("kdfast.sweep.results_log._lock_byte", lambda *_: True)
            command.enter()
        with pytest.raises(OutputError, match="does not see the locks of"):
            check_locks(command)


class Workers:
    """Workers that end after three looks."""

    def __init__(self, errors: list[KdfastError], lost: str = "", write: Callable[[], Any] = lambda: None) -> None:
        self._errors, self._lost, self._write = errors, lost, write
        self.looks, self.stopped = 0, False

    def describe(self) -> str:
        return "workers"

    def have_ended(self) -> bool:
        self.looks += 1
        return self.looks > 3

    def stop(self) -> None:
        self.stopped = True
        self._write()

    def errors(self) -> list[KdfastError]:
        return self._errors

    def lost(self) -> str:
        return self._lost


@pytest.mark.parametrize(
    ("errors", "lost", "finished", "raised", "looks"),
    [
        ([], "", True, None, 4),
        ([Interrupted("stopped")], "", True, None, 4),  # other workers have done its runs
        ([], "exit code -9", True, None, 4),
        ([Interrupted("stopped")], "", False, "stopped", 4),
        ([], "exit code -9", False, r"ended early \(exit code -9\): run the same command again", 4),
        ([DivergedError("not finite"), Interrupted("stopped")], "", False, "not finite", 4),
        ([DivergedError("not finite"), OutputError("the disk is full")], "", False, "the disk is full", 1),
    ],
)
def test_errors_of_workers(
    errors: list[KdfastError], lost: str, finished: bool, raised: str | None, looks: int, tmp_path: Path
) -> None:
    class Log(ResultsLog):
        def results(self) -> list[dict[str, Any]]:
            return self.rows()

    log = Log(tmp_path)
    runs: Any = [SimpleNamespace(key=key) for key in KEYS]
    workers = Workers(errors, lost, lambda: [log.append({"key": key}) for key in KEYS if finished])
    told: list[str] = []
    said: list[str] = []

    def start() -> None:
        watch(
            workers,
            runs,
            log,
            on_row=lambda row: told.append(row["key"]),
            progress=lambda done, total, status: said.append(status),
        )

    if raised is None:
        start()
    else:
        with pytest.raises(KdfastError, match=raised):
            start()
    assert workers.stopped
    assert workers.looks == looks
    assert told == (KEYS if finished else [])
    assert set(said) <= {f"workers; ended early: {lost}" if lost else "workers"}


def test_a_killed_process_is_counted_out_and_named() -> None:
    processes = Processes.__new__(Processes)
    ended = [SimpleNamespace(exitcode=code, is_alive=lambda code=code: code is None) for code in (None, -9, None, 0)]
    processes._processes = ended  # type: ignore[assignment]
    assert (processes.describe(), processes.lost()) == ("2 processes", "exit code -9")
    del ended[2], ended[2]
    assert processes.describe() == "1 process"


def test_a_check_that_fails_stops_the_workers(tmp_path: Path) -> None:
    def fail() -> None:
        raise OutputError("no locks")

    workers = Workers([])
    with pytest.raises(OutputError, match="no locks"):
        watch(workers, [], ResultsLog(tmp_path), check=fail)
    assert workers.stopped


class Ray:
    """What `RayTasks` calls: a cluster of machines with so many cores and GPUs each, whose tasks return or raise."""

    class exceptions:
        class RayError(Exception):
            pass

        class RayTaskError(RayError):
            pass

    def __init__(self, *nodes: tuple[int, float], ends: Any = None) -> None:
        self._nodes, self._ends, self.started = nodes, ends, 0

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"CPU": float(cpus), "GPU": gpus}} for cpus, gpus in self._nodes]

    def remote(self, function: Any = None) -> Any:
        self.started += not callable(function)
        return self if callable(function) else "task"

    def options(self, **_: Any) -> Any:
        return self

    def wait(self, tasks: list[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return tasks, []

    def get(self, task: Any) -> Any:
        if isinstance(self._ends, Exception):
            raise self._ends
        return self._ends


def ray_tasks(monkeypatch: pytest.MonkeyPatch, cluster: Ray, jobs: int | None, most: int, **engine: Any) -> RayTasks:
    monkeypatch.setitem(sys.modules, "ray", cluster)
    return RayTasks(Task(lambda: None, ResultsLog(Path("out")), False, 1), EngineConfig("ray", **engine), jobs, most)


@pytest.mark.parametrize(
    ("nodes", "jobs", "most", "cpus", "expected"),
    [
        ([(4, 0), (2, 0)], None, 10, 1, 6),
        ([(3, 0), (3, 0)], None, 10, 2, 2),  # a task has all of its cores on one machine
        ([(4, 0)], None, 2, 1, 2),
        ([(4, 0)], 8, 3, 1, 3),
        ([(1, 0)], 8, 9, 1, 8),
    ],
)
def test_tasks_on_ray(
    monkeypatch: pytest.MonkeyPatch, nodes: list, jobs: int | None, most: int, cpus: int, expected: int
) -> None:
    cluster = Ray(*nodes)
    tasks = ray_tasks(monkeypatch, cluster, jobs, most, cpus=cpus)
    assert cluster.started == expected
    assert tasks.describe() == f"{expected} workers on Ray"


def test_tasks_that_can_run_nowhere_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = ray_tasks(monkeypatch, Ray((4, 0.0), (4, 0.0)), None, 3, cpus=2, gpus=0.5)
    assert tasks.describe() == "1 worker on Ray; waiting: no machine of the cluster has 2 CPU cores and 0.5 GPUs"


def test_a_fault_in_a_task_is_said_with_its_text(monkeypatch: pytest.MonkeyPatch) -> None:
    fault = Ray.exceptions.RayTaskError("ray::kdfast (pid=1)\n  File x\nRuntimeError: CUDA out of memory\n")
    tasks = ray_tasks(monkeypatch, Ray((1, 0.0), ends=fault), 1, 1)
    assert tasks.have_ended()
    assert tasks.lost() == "RuntimeError: CUDA out of memory"
