"""`kdfast plan`: what it prints, that nothing is kept, and what it refuses."""

import json
from pathlib import Path

import pytest

FAST = ("--calibrate-seconds", "0.1", "--epochs", "2", "--batch-size", "20", "--views", "3", "--fraction", "0.5")


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)


def test_prints_the_stages_and_what_pruning_saves(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    done = kdfast("plan", "--data", tiny, "--teacher", teacher, "--student", "resnet8", "--method", "el2n", *FAST)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert [line.split("  ")[1] for line in lines[1:5]] == ["cache for scores", "prune", "cache", "distill"]
    works = ("120 samples x 1 view", "60 of 120 samples", "60 samples x 3 views", "6 steps of 20")
    assert all(work in line for work, line in zip(works, lines[1:5], strict=True))
    assert sum(line.startswith("pruning ") for line in lines) == 2
    assert lines[-1].startswith("measured in ")
    assert list(tmp_path.iterdir()) == []


def test_json_has_every_number(kdfast, tiny: Path, teacher: Path) -> None:
    done = kdfast(
        "plan", "--data", tiny, "--teacher", teacher, "--student", "resnet8", "--students", "4", *FAST, "--json"
    )
    found = json.loads(done.out)
    flow = found["flows"]["pruned"]
    *once, each = flow["stages"]
    assert [stage["name"] for stage in once] == ["prune", "cache"]
    assert flow["seconds"] == pytest.approx(sum(stage["seconds"] for stage in once) + 4 * each["seconds"])
    assert each["seconds"] == pytest.approx(sum(each["parts"].values()))
    assert min(found["rates"]["trained"], found["free_bytes"]) > 0


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((), "a stage needs the teacher: pass --teacher, or --alpha 0 and a method that needs none"),
        (("--alpha", "0", "--jobs", "2"), "--jobs is 2, more than --students, 1: pass at most as many"),
        (("--alpha", "0", "--method", "el2n"), "a stage needs the teacher"),
        (("--alpha", "0", "--method", "el2m"), "no pruning method is named 'el2m': did you mean 'el2n'?"),
        (("--alpha", "2"), "--alpha is '2': pass a number in [0, 1], or auto"),
        (("--alpha", "0", "--fraction", "0.1"), "--batch-size is 20, more than the 12 samples that are kept"),
        (("--alpha", "0", "--student", "resnet9"), "resnet9"),
        (("--alpha", "0", "--method", "dual", "--dynamics-net", "resnet9"), "resnet9"),
        (("--alpha", "0", "--views", "200"), "--views is 200"),
        (("--top-k", "3", "--teacher", "T.pt"), "--top-k is 3: pass 1 to 2"),
        (("--calibrate-seconds", "nan", "--alpha", "0"), "Invalid value for '--calibrate-seconds'"),
    ],
)
def test_refuses(kdfast, tiny: Path, teacher: Path, tmp_path: Path, flags: tuple[str, ...], reason: str) -> None:
    words = [str(teacher) if word == "T.pt" else word for word in flags]
    done = kdfast("plan", "--data", tiny, "--student", "resnet8", *FAST, *words)
    assert done.code == 2, done.err
    assert reason in done.err
    assert (done.out, done.err.count("\n"), list(tmp_path.iterdir())) == ("", 1, [])


def test_options_without_effect_are_named(kdfast, tiny: Path) -> None:
    flags = ("--alpha", "0", "--whole-cache", "--top-k", "2", "--dtype", "float32", "--dynamics-runs", "3")
    done = kdfast("plan", "--data", tiny, "--student", "resnet8", *FAST, *flags)
    assert done.code == 0, done.err
    assert done.err.splitlines() == [
        "kdfast: --whole-cache has no effect: the students read no cache",
        "kdfast: --top-k has no effect: no stage makes a cache",
        "kdfast: --dtype has no effect: no stage makes a cache",
        "kdfast: --dynamics-runs has no effect: the selection needs no dynamics",
    ]
