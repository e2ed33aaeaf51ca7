"""Trackers: what a run tells each package, recorded by stand-ins, and by TensorBoard itself where it is installed."""

import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from kdfast import trackers
from kdfast.errors import UsageError
from kdfast.trackers import TRACKERS, TrackerSet

TRAINING = ("--student", "resnet8", "--alpha", 0, "--epochs", 2, "--batch-size", 20, "--log-every", 3, "--quiet")
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


class StandIn(types.ModuleType):
    """A module whose functions record their calls; the objects that they return do so too."""

    def __init__(self, name: str, calls: list[Call]) -> None:
        super().__init__(name)
        self._calls = calls
        self.id, self.info = "the-id", types.SimpleNamespace(run_id="the-id")

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self._calls.append((name, args, kwargs))
            return self

        return call


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """Calls of any tracker's package."""
    found: list[Call] = []
    for kind in TRACKERS.values():
        monkeypatch.setitem(sys.modules, kind.module, StandIn(kind.module, found))
    return found


def train(kdfast, tiny: Path, out: Path, *more: object) -> Any:
    return kdfast("distill", "--data", tiny, *TRAINING, "--out", out, *more)


def logged(name: str, calls: list[Call]) -> list[tuple[int, dict[str, float]]]:
    """Return what a package was told, as (step, values)."""
    if name == "tensorboard":
        steps: dict[int, dict[str, float]] = {}
        for _, (key, value, step), _ in (call for call in calls if call[0] == "add_scalar"):
            steps.setdefault(step, {})[key] = value
        return list(steps.items())
    word = {"wandb": "log", "mlflow": "log_metrics", "trackio": "log"}[name]
    return [(kwargs["step"], args[0]) for called, args, kwargs in calls if called == word]


@pytest.mark.parametrize("name", TRACKERS)
def test_tells_each_package_every_row_and_the_result(kdfast, tiny: Path, tmp_path: Path, calls, name: str) -> None:
    ran = train(kdfast, tiny, tmp_path / "run", "--track", name, "--eval-every", 1)
    assert ran.code == 0, ran.err
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    told: dict[int, dict[str, float]] = {}
    for step, values in logged(name, calls):
        told.setdefault(step, {}).update(values)
    assert list(told) == [3, 6, 9, 12]
    for row in rows:
        assert {key: value for key, value in row.items() if key != "step"}.items() <= told[row["step"]].items()
        assert told[row["step"]]["images_per_second"] > 0
    assert told[12]["test_top5"] == result["test_top5"]
    last = {"tensorboard": "close", "wandb": "finish", "mlflow": "end_run", "trackio": "finish"}[name]
    assert calls[-1][0] == last


@pytest.mark.parametrize("name", [name for name in TRACKERS if name != "tensorboard"])
def test_a_resumed_run_continues_under_its_name(kdfast, tiny: Path, tmp_path: Path, calls, name: str) -> None:
    from kdfast.distillation.trainer import Trainer

    step = Trainer.train_step

    def stop(self: Trainer, batch: object) -> None:
        step(self, batch)
        if self.step == 10:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop)
        assert train(kdfast, tiny, tmp_path / "run", "--track", name, "--checkpoint-seconds", 0).code == 75
    identifier = json.loads((tmp_path / "run" / trackers.STATE).read_text())[name]
    stopped = len(calls)
    assert train(kdfast, tiny, tmp_path / "run", "--track", name).code == 0
    start = {"wandb": "init", "mlflow": "start_run", "trackio": "init"}[name]
    starts = [kwargs for called, _, kwargs in calls if called == start]
    key = {"wandb": "id", "mlflow": "run_id", "trackio": "name"}[name]
    assert starts[1][key] == identifier
    if name != "trackio":
        assert starts[0].get(key) is None
    assert [step for step, _ in logged(name, calls[:stopped])] == [3, 6, 9]
    assert [step for step, _ in logged(name, calls[stopped:])] == [12, 12], "no step twice but for the result"


def test_what_a_package_prints_is_no_part_of_the_result(kdfast, tiny: Path, tmp_path: Path, monkeypatch) -> None:
    class Printing(StandIn):
        def __getattr__(self, name: str) -> Any:
            if not name.startswith("__"):
                print(f"visit me: {name}")
            return super().__getattr__(name)

    monkeypatch.setitem(sys.modules, "trackio", Printing("trackio", []))
    ran = train(kdfast, tiny, tmp_path / "run", "--track", "trackio", "--json")
    assert json.loads(ran.out)["steps"] == 12
    assert {"visit me: init", "visit me: log", "visit me: finish"} <= set(ran.err.splitlines())


def test_a_failed_run_is_said_to_have_failed(kdfast, tiny: Path, tmp_path: Path, calls) -> None:
    assert train(kdfast, tiny, tmp_path / "run", "--track", "mlflow", "--track", "wandb", "--lr", "1e30").code == 5
    assert ("end_run", ("FAILED",), {}) in calls
    assert ("finish", (), {"exit_code": 1}) in calls


def test_a_finished_run_starts_no_tracker(kdfast, tiny: Path, tmp_path: Path, calls) -> None:
    assert train(kdfast, tiny, tmp_path / "run").code == 0
    assert train(kdfast, tiny, tmp_path / "run", "--track", "wandb").code == 0
    assert not calls


@pytest.mark.parametrize("name", TRACKERS)
def test_a_missing_package_is_named_before_anything_is_written(
    kdfast, tiny: Path, tmp_path: Path, monkeypatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, TRACKERS[name].module, None)
    ran = train(kdfast, tiny, tmp_path / "run", "--track", name)
    assert (ran.code, ran.err) == (
        2,
        f"kdfast: --track {name} needs a missing package: pip install {TRACKERS[name].package}\n",
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("default")
def test_a_tracker_that_fails_does_not_end_the_run(kdfast, tiny: Path, tmp_path: Path, calls, monkeypatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no server\nat all")

    monkeypatch.setattr(trackers.MLflow, "log", fail)
    ran = train(kdfast, tiny, tmp_path / "run", "--track", "mlflow")
    assert ran.code == 0
    assert ran.err == "kdfast: mlflow gets no more metrics, it failed: no server; metrics.jsonl has all of them\n"
    monkeypatch.setattr(trackers.MLflow, "__init__", fail)
    ran = train(kdfast, tiny, tmp_path / "other", "--track", "mlflow")
    assert (ran.code, ran.err) == (4, "kdfast: --track mlflow: it cannot start a run: no server\n")


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(UsageError, match="`track` is 'wnadb': did you mean 'wandb'"):
        TrackerSet(["wnadb"])


def test_tensorboard_itself_reads_the_events(kdfast, tiny: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    assert train(kdfast, tiny, tmp_path / "run", "--track", "tensorboard").code == 0
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in found] == [row["step"] for row in rows]
    assert [value for _, value in found] == pytest.approx([row["loss"] for row in rows], rel=1e-6)
