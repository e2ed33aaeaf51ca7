"""Rules of the engine, against values worked out by hand: the teacher's logits, speeds, budgets and locks."""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kdfast.files import write_json
from kdfast.reproduction.engine.budget import Budget, RunCost, group_of, measured_rate
from kdfast.reproduction.engine.locks import hold
from kdfast.reproduction.engine.targets import CACHE, ONLINE, choose_targets
from kdfast.reproduction.study_file import load_study
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.work import Postponed, run_worker

TARGETS = """
title: T
source: S
recipe: {epochs: 100}
cells:
  - {fraction: 0.5, kd: [off, on]}
  - {fraction: 0.5, temperature: 2}
  - {fraction: 0.5, term: dkd}
  - {fraction: 0.5, term: vid}
  - {fraction: 0.25}
  - {fraction: 0.5, teacher: resnet8}
  - {fraction: 1, match_steps_of: 0.5}
  - {fraction: 1, mixup: 0.2}
  - {fraction: 1}
"""


@pytest.mark.parametrize(
    ("views", "epochs", "cached"),
    [
        # 300 epochs of half the data by the first teacher, 100 of the other two and of all data but the mixed, and 50
        # of all data for the steps of half of it.
        (301, None, set()),
        (299, None, {1, 2, 3}),
        (101, None, {1, 2, 3}),
        (99, None, {1, 2, 3, 5, 6, 9}),
        (49, None, {1, 2, 3, 5, 6, 7, 9}),
        (99, 40, {1, 2, 3}),
    ],
)
def test_a_cache_is_made_if_its_views_are_shown_more_often(
    tmp_path: Path, views: int, epochs: int | None, cached: set[int]
) -> None:
    (tmp_path / "s.yaml").write_text(TARGETS)
    study = load_study(str(tmp_path / "s.yaml"))
    spec = SimpleNamespace(count=views, is_drawn=False)
    source: Any = SimpleNamespace(view_spec=spec, train=range(1000))
    found = [
        choose_targets(study, cell, source, cell.run_config(epochs=100, seed=0, precision="fp32"), epochs)
        for cell in study.cells
    ]
    assert found[0] is None
    assert {number for number, targets in enumerate(found) if targets == CACHE} == cached
    assert all(targets == ONLINE for number, targets in enumerate(found) if number and number not in cached)
    spec.is_drawn = True
    plain = study.cells[1]
    config = plain.run_config(epochs=100, seed=0, precision="fp32")
    assert choose_targets(study, plain, source, config, None) == ONLINE, "drawn views are never seen twice"


def row(images: int, seconds: float, **changes: Any) -> dict[str, Any]:
    cell = {"student": "resnet8", "teacher": "resnet32", "recipe": {"batch_size": 64}, **changes.pop("cell", {})}
    machine = {"host": "a", "device": "cpu", "threads": 2}
    return {"cell": cell, "targets": CACHE, "precision": "fp32", "machine": machine, "images": images,
            "seconds": seconds, **changes}  # fmt: skip


def test_speed_is_that_of_the_last_equal_run_on_this_machine() -> None:
    here = {"host": "a", "device": "cpu", "threads": 2}
    rows = [row(1000, 10.0), row(1000, 5.0), row(1000, 1.0, machine={**here, "threads": 1}),
            row(1000, 2.0, cell={"student": "resnet32"}), row(1000, 2.0, targets=ONLINE)]  # fmt: skip
    group = group_of(rows[0]["cell"], CACHE, "fp32")
    assert measured_rate(rows, group, here) == 200.0
    assert group == group_of({**rows[0]["cell"], "teacher": "resnet110"}, CACHE, "fp32"), "as fast from any cache"
    assert group_of(rows[0]["cell"], ONLINE, "fp32") != group_of({**rows[0]["cell"], "teacher": "x"}, ONLINE, "fp32")
    assert measured_rate(rows, group, {**here, "host": "b"}) is None
    assert measured_rate(rows, group_of(rows[0]["cell"], CACHE, "bf16"), here) is None


def test_a_budget_counts_what_is_missing_and_what_is_done(tmp_path: Path) -> None:
    here = {"host": "a", "device": "cpu", "threads": 2}
    rows: list[dict[str, Any]] = []
    log: Any = SimpleNamespace(rows=lambda: rows)
    teacher, folder = tmp_path / "teacher.pt", tmp_path / "run"
    cost = RunCost(group_of(row(1, 1)["cell"], CACHE, "fp32"), 1000, 40.0, {teacher: 60.0}, folder)
    budget = Budget(time.time() + 90, log, here, {"k": cost})
    assert budget.seconds("k") == 100
    assert not budget("k")
    teacher.touch()
    assert budget.seconds("k") == 40
    assert budget("k")
    rows.append(row(1000, 200.0))
    assert budget.seconds("k") == 200, "5 images per second"
    assert not budget("k")
    folder.mkdir()
    write_json(folder / "status.json", {"state": "running", "step": 75, "steps": 100})
    assert budget.seconds("k") == 50
    assert budget("k")


def test_an_artefact_is_made_by_one_and_used_by_many(tmp_path: Path) -> None:
    with hold(tmp_path, "caches/a") as first, hold(tmp_path, "caches/a") as second, hold(tmp_path, "caches/b") as other:
        assert (first, second, other) == (True, False, True)
        with hold(tmp_path, "caches/a", shared=True) as user:
            assert not user
    with hold(tmp_path, "caches/a", shared=True) as one, hold(tmp_path, "caches/a", shared=True) as two:
        assert (one, two) == (True, True)
        with hold(tmp_path, "caches/a") as maker:
            assert not maker
    with hold(tmp_path, "caches/a") as again:
        assert again


class Session:
    """Runs whose first one waits for another process until two others are done."""

    def __init__(self) -> None:
        self.order: list[str] = []

    def runs(self) -> list[Any]:
        return [SimpleNamespace(key=character * 64) for character in "abc"]

    def execute(self, run: Any, out: Path, *, progress: Any = None) -> dict[str, Any]:
        if run.key[0] == "a" and len(self.order) < 2:
            raise Postponed
        self.order.append(run.key[0])
        return {"key": run.key}

    def delete_checkpoints(self, run: Any, out: Path, *, keep_runs: bool) -> None:
        pass


def test_a_worker_goes_on_with_other_runs(tmp_path: Path) -> None:
    class Rows(ResultsLog):
        def results(self) -> list[dict[str, Any]]:
            return self.rows()

    session = Session()
    run_worker(session, session.runs(), Rows(tmp_path), keep_runs=False)
    assert session.order == ["b", "c", "a"]
    refused = Session()
    (tmp_path / "results.jsonl").unlink()
    run_worker(refused, refused.runs(), Rows(tmp_path), keep_runs=False, admit=lambda key: key[0] == "b")
    assert refused.order == ["b"]
