"""`kdfast reproduce`: a study's cells, each once, with what they need, and equal to other commands."""

import functools
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from kdfast.reproduction.engine import places
from kdfast.teacher.flatten import FlattenConfig

STUDY = """
title: Tiny
source: Nobody
recipe: {epochs: 4, batch_size: 10, lr: 0.05, views: 3}
defaults: {student: resnet8, teacher: resnet8}
cells:
  - {fraction: 0.25, kd: [off, on], method: [random, forgetting]}
  - {fraction: 0.25, teacher_fraction: 0.5, disjoint: on, kd: [off, on]}
  - {fraction: 0.25, term: sp, ce_weight: 1, alpha: 2}
  - {fraction: 1, kd: [off, on], match_steps_of: 0.25}
order: [fraction, kd, method]
dynamics: {epochs: 2, batch_size: 20}
published:
  npz:
    - {fraction: 0.25, kd: off, top1: 50}
"""


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def command(study: Path, tiny: Path, tmp_path: Path) -> tuple:
    return ("reproduce", study, "--data", tiny, "--out", tmp_path / "out")


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    """Start a command as a process in its own session; kill it at the end of the test."""
    started: list[subprocess.Popen] = []

    def begin(*words: object) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        arguments = [sys.executable, "-m", "kdfast", *map(str, words)]
        started.append(subprocess.Popen(arguments, start_new_session=True, preexec_fn=heard, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def facts(out: Path) -> list[tuple]:
    """What rows of the same runs must have in common: everything but times and places."""
    return sorted((r["key"], r["weights"], r["subset"], r["test_top1"], str(r["teacher_top1"])) for r in rows(out))


def find(out: Path, **axes: object) -> dict:
    (row,) = [r for r in rows(out) if all(r["cell"].get(name) == value for name, value in axes.items())]
    return row


def test_runs_every_cell_with_what_it_needs(kdfast, command: tuple, tmp_path: Path) -> None:
    out, command = tmp_path / "out", (*command, "--set", "disjoint=off")
    dry = kdfast(*command, "--dry-run")
    assert dry.code == 0, dry.err
    assert "would run 7 of 7" in dry.out
    assert not out.exists()
    outcome = kdfast(*command)
    assert outcome.code == 0, outcome.err
    assert len(rows(out)) == 7
    assert len(list((out / "teachers").glob("*.pt"))) == 1
    assert len(list((out / "dynamics").iterdir())) == 1
    assert list((out / "runs").iterdir()) == []
    published = find(out, kd=False, fraction=0.25, method="random", disjoint=None)
    top1 = published["test_top1"]
    assert f"| {top1:.2f} (1) |  | 50.00 | {top1 - 50:+.2f} |" in outcome.out
    again = kdfast(*command)
    assert again.code == 0
    assert len(rows(out)) == 7
    only = kdfast("reproduce", command[1], "--out", out, "--report-only")
    assert only.code == 0, only.err
    assert (out / "table.md").read_text() in only.out
    for row in rows(out):
        assert row["epochs"] == (1 if row["cell"]["fraction"] == 1 else 4)
        assert row["steps"] == 12


@pytest.mark.slow
def test_the_stated_command_trains_the_same_student(kdfast, command: tuple, tmp_path: Path) -> None:
    """Runs with a cache, an online teacher with a term, without a teacher, and on samples that a teacher never saw."""
    out = tmp_path / "out"
    assert kdfast(*command, "--keep-runs").code == 0
    assert {row["targets"] for row in rows(out)} == {None, "cache", "online teacher"}
    chosen = [row for row in rows(out) if row["cell"]["method"] == "random"]
    for number, row in enumerate(chosen):
        words = shlex.split(row["command"])
        assert words[0] == "kdfast"
        words[words.index("--out") + 1] = str(tmp_path / f"again-{number}")
        outcome = kdfast(*words[1:])
        assert outcome.code == 0, outcome.err
        result = json.loads((tmp_path / f"again-{number}" / "result.json").read_text())
        assert result["weights"] == row["weights"], row["command"]


def test_disjoint_samples_are_those_that_the_teacher_never_saw(kdfast, command: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = kdfast(*command, "--set", "disjoint=on", "--seeds", "2", "--keep-runs")
    assert outcome.code == 0, outcome.err
    (seen,) = (out / "teachers").glob("*.subset.npy")
    teacher = set(np.load(seen).tolist())
    assert len(teacher) == 60
    subsets = [np.load(path) for path in (out / "subsets").glob("*.npy")]
    assert len(subsets) == 2, "with and without the teacher they are the same"
    for subset in subsets:
        assert len(subset) == 30
        assert not teacher & set(subset.tolist())
    assert set(subsets[0].tolist()) != set(subsets[1].tolist())


def test_scores_of_the_teacher_and_of_the_flattened_teacher_have_their_own_inputs(
    kdfast, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "FlattenConfig", lambda: FlattenConfig(iterations=2, batch_size=10))
    study = tmp_path / "scores.yaml"
    study.write_text(
        "title: T\nsource: S\nrecipe: {epochs: 1, batch_size: 10, views: 2}\n"
        "defaults: {student: resnet8, teacher: resnet8, kd: off, fraction: 0.25}\n"
        "cells: [{method: [medium, influence-fvm]}]\n"
    )
    out = tmp_path / "out"
    outcome = kdfast("reproduce", study, "--data", tiny, "--out", out)
    assert outcome.code == 0, outcome.err
    assert len({row["subset"] for row in rows(out)}) == len(rows(out)) == 2
    assert len(list((out / "teachers").glob("*-flat-*.pt"))) == 1
    assert len(list((out / "outputs").iterdir())) == 1


def test_a_given_teacher_is_used_and_others_are_refused(kdfast, command: tuple, teacher: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = kdfast(*command, "--set", "kd=on", "--set", "term=sp", "--teacher", f"resnet8={teacher}")
    assert outcome.code == 0, outcome.err
    (row,) = rows(out)
    assert row["teacher_top1"] == json.loads((teacher.parent / "result.json").read_text())["test_top1"]
    assert list((out / "teachers").glob("*.run")) == []
    page = (out / "report.html").read_text()
    assert f"--out {out} --teacher resnet8={teacher} --set" in page, "open cells have the same teacher"
    other = kdfast(*command, "--teacher", f"resnet14={teacher}")
    assert other.code == 2
    assert "--teacher names resnet14, and the networks of these cells' teachers are: resnet8" in other.err
    wrong = kdfast(*command, "--teacher", str(teacher))
    assert wrong.code == 2
    assert "pass NAME=FILE" in wrong.err


def test_teachers_can_be_made_before_the_runs(kdfast, command: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = kdfast(*command, "--teachers-only", "--epochs", "2")
    assert made.code == 0, made.err
    files = sorted((out / "teachers").glob("*.pt"))
    assert len(files) == 2, "one on all data, one on half of it"
    assert sorted(line.partition(": top-1 ")[0] for line in made.out.splitlines()) == sorted(map(str, files))
    assert not (out / "results.jsonl").exists()
    times = [file.stat().st_mtime_ns for file in files]
    ran = kdfast(*command, "--epochs", "2", "--set", "disjoint=on", "--set", "kd=on")
    assert ran.code == 0, ran.err
    assert len(rows(out)) == 1
    assert [file.stat().st_mtime_ns for file in sorted((out / "teachers").glob("*.pt"))] == times
    none = kdfast(*command, "--teachers-only", "--set", "kd=off", "--set", "disjoint=off")
    assert "these cells have no teacher" in none.out


def test_a_shorter_schedule_is_marked_and_kept_apart(kdfast, command: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limits = ("--set", "kd=off", "--methods", "random", "--set", "disjoint=off")
    short = kdfast(*command, *limits, "--epochs", "2", "--fractions", ".25")
    assert short.code == 0, short.err
    assert "Not the published recipe: 2 epochs in place of 4" in short.out
    assert "| 50.00 |  |" in short.out, "the published value is shown, and nothing is subtracted from it"
    full = kdfast(*command, *limits, "--fractions", ".25")
    assert full.code == 0, full.err
    assert len(rows(out)) == 4
    assert {row["compressed_to"] for row in rows(out)} == {2, None}
    assert full.out.index("| 50.00 | ") < full.out.index("Not the published recipe"), "each schedule has its own table"


def test_a_budget_begins_only_what_fits(kdfast, command: tuple, tmp_path: Path) -> None:
    out = tmp_path / "out"
    limits = ("--set", "kd=off", "--methods", "random", "--set", "disjoint=off")
    none = kdfast(*command, *limits, "--budget", "0.0001s")
    assert none.code == 0, none.err
    assert "2 runs left, about" in none.out
    assert "None of them ends within the budget: pass --budget 1m or more" in none.out
    assert "waits for other processes" not in none.out + none.err
    empty = kdfast("reproduce", command[1], "--out", out, "--report-only")
    assert empty.code == 3
    assert "has no row of a study" in empty.err
    all_of_them = kdfast(*command, *limits, "--budget", "1h")
    assert all_of_them.code == 0, all_of_them.err
    assert len(rows(out)) == 2
    left = kdfast(*command, *limits, "--budget", "0.001s", "--seeds", "2")
    assert left.code == 0, left.err
    assert "2 runs left, about" in left.out
    assert len(rows(out)) == 2
    for wrong in ("3", "h", "-1h", "3 hours", "1..5h"):
        refused = kdfast(*command, "--budget", wrong)
        assert refused.code == 2
        assert "such as 90m, 3h or 2d" in refused.err


def test_names_what_is_wrong_and_writes_nothing(kdfast, command: tuple, study: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for words, message in (
        (("reproduce",), "pass a study and --out, or --list"),
        (("reproduce", "fig33", "--out", out), "no study is named 'fig33'"),
        (("reproduce", study, "--out", out), "pass --data, or --report-only"),
        ((*command, "--seeds", "1,1"), "--seeds is '1,1'"),
        ((*command, "--seeds", "0"), "--seeds is '0'"),
        ((*command, "--seeds", "3,1000"), "--seeds has 1000, the seed of the teachers"),
        ((*command, "--epochs", "5"), "--epochs is 5, and the recipe of tiny has 4: pass fewer"),
        ((*command, "--dataset", "npy"), "tiny has no published value for 'npy': did you mean 'npz'"),
        ((*command, "--set", "fraction=.3"), "no cell of tiny has the fraction 0.3"),
        ((*command, "--fractions", "a"), "--fractions is 'a': write a number"),
        ((*command, "--mean", "0.5"), "pass --mean and --std together"),
    ):
        outcome = kdfast(*words)
        assert outcome.code == 2, outcome.err
        assert message in outcome.err
        assert outcome.err.count("\n") == 1
        assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    other = kdfast(*command)
    assert other.code == 4
    assert "holds notes.txt, and no study" in other.err


def test_too_few_samples_beside_the_teachers_are_named_before_the_work(kdfast, tiny: Path, tmp_path: Path) -> None:
    study, out, odd = tmp_path / "halves.yaml", tmp_path / "out", tmp_path / "odd.npz"
    with np.load(tiny) as data:
        np.savez(odd, **{name: array[:119] for name, array in data.items()})  # halves of 60 and 60 of 119 samples
    study.write_text(
        "title: T\nsource: S\nrecipe: {epochs: 1, batch_size: 10}\ndefaults: {student: resnet8, teacher: resnet8}\n"
        "cells: [{fraction: 0.5, teacher_fraction: 0.5, disjoint: on}]\n"
    )
    outcome = kdfast("reproduce", study, "--data", odd, "--out", out)
    assert outcome.code == 3, outcome.err
    assert "a teacher on 0.5 of the data leaves too few samples for a student on 0.5" in outcome.err
    assert not out.exists()


@pytest.mark.slow
def test_processes_share_cells_and_a_killed_one_changes_no_row(
    start, kdfast, command: tuple, study: Path, tiny: Path, tmp_path: Path
) -> None:
    whole = ("reproduce", study, "--data", tiny, "--out", tmp_path / "whole")
    assert kdfast(*whole).code == 0
    expected = facts(tmp_path / "whole")
    out, rng = tmp_path / "out", random.Random(0)
    for _ in range(6):
        process = start(*command)
        deadline = time.monotonic() + 60
        while not (out / ".claims").exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 4))
        process.kill()
        process.communicate()
    calls = [start(*command), start(*command, "--jobs", "2")]
    told = [call.communicate(timeout=600) for call in calls]
    assert [call.returncode for call in calls] == [0, 0], told
    assert facts(out) == expected
    assert len({row["key"] for row in rows(out)}) == len(rows(out)) == 9
    assert list((out / "runs").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_with_75_and_the_same_command_resumes(start, command: tuple, tmp_path: Path, number: int) -> None:
    out = tmp_path / "out"
    command[1].write_text(STUDY.replace("epochs: 4,", "epochs: 4000,"))
    long = (*command, "--set", "kd=off", "--set", "match_steps_of=0.25")
    process = start(*long)
    deadline = time.monotonic() + 60
    while not list(out.glob("runs/*/metrics.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "run the same command again to resume" in err
    (pointer,) = out.glob("runs/*/checkpoints/latest.json")
    assert json.loads(pointer.read_text())["step"] > 0
