"""`kdfast prune --method if-beta` and `kdfast report if-beta`: files, resuming, rejected commands."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest

from kdfast.data.readers.registry import open_source
from kdfast.pruning.if_beta.search import Schedule
from kdfast.pruning.if_beta.selector import costs, select
from kdfast.sweep.summary import group_rows
from kdfast.teacher.build import build_cache

QUICK = ("--option", "steps=3", "--option", "inner_steps=20", "--option", "held=0.2")


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "distillation_seconds", lambda *_: 1000.0)


def interrupt_step(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Interrupt the search step with this number, counted from 1 over all searches; return a list of the steps."""
    take_step, calls = Schedule.take_step, []

    def killed(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == number:
            raise KeyboardInterrupt
        return take_step(*arguments)

    monkeypatch.setattr(Schedule, "take_step", killed)
    return calls


def command(tiny: Path, cache: Path, out: Path, fraction: float = 0.25) -> tuple[object, ...]:
    head = ("prune", "--data", tiny, "--cache", cache, "--method", "if-beta", "--fraction", fraction)
    return (*head, "--seed", 3, "--out", out, *QUICK)


def test_writes_subset_provenance_and_page(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "idx.npy"
    outcome = kdfast(*command(tiny, cache, out))
    assert outcome.code == 0, outcome.err
    assert "kept 30 of 120 training samples (if-beta, balanced, seed 3); 10 per class" in outcome.out
    assert sorted(path.name for path in out.parent.iterdir()) == ["idx.json", "idx.npy"]
    about = json.loads(out.with_suffix(".json").read_text())
    found = about["if-beta"]
    assert about["parameters"]["options"]["steps"] == 3
    assert about["sources"] == {"cache": hashlib.sha256((cache / "manifest.json").read_bytes()).hexdigest()}
    assert found["influence_l2"] == 0.1
    assert len(found["path"]) == 4
    assert len(found["rewards"]) == 3
    seconds = found["score_seconds"] + found["search_seconds"]
    assert found["percent_of_distillation"] == pytest.approx(seconds / 10)
    assert sum(found["ranks"]["kept"]) == sum(found["scores"]["kept"]) == sum(found["classes"]["kept"]) == 30
    kept = np.load(out)
    ends = [row["id"] for row in (*found["ends"]["lowest"], *found["ends"]["highest"])]
    assert np.isin(ends, kept).all()
    assert found["ends"]["highest"][0]["score"] >= found["ends"]["lowest"][0]["score"]

    page = tmp_path / "page.html"
    outcome = kdfast("report", "if-beta", out.with_suffix(".json"), "--out", page)
    assert outcome.code == 0, outcome.err
    html = page.read_text()
    assert html.count("<svg") == 6
    assert f"{found['a']:.2f}, {found['b']:.2f}" in html
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", html)


def test_resumes_an_interrupted_search(
    kdfast, tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.npy", tmp_path / "parts.npy"
    assert kdfast(*command(tiny, cache, whole)).code == 0
    calls = interrupt_step(monkeypatch, 3)
    outcome = kdfast(*command(tiny, cache, parts))
    assert outcome.code == 75
    assert [path.name for path in tmp_path.glob("parts*")] == ["parts.search.json"]
    outcome = kdfast(*command(tiny, cache, parts, fraction=0.5))
    assert outcome.code == 4
    assert re.search(r"is the checkpoint of another search \(--fraction was 0\.\d+, is 0\.5\)", outcome.err)
    outcome = kdfast(*command(tiny, cache, parts))
    assert outcome.code == 0, outcome.err
    assert len(calls) == 4
    assert sorted(path.name for path in tmp_path.glob("parts*")) == ["parts.json", "parts.npy"]
    assert (np.load(parts) == np.load(whole)).all()
    old, new = (json.loads(path.with_suffix(".json").read_text())["if-beta"] for path in (whole, parts))
    assert new["path"] == old["path"]


def test_selects_several_fractions(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    outcome = kdfast(*command(tiny, cache, tmp_path / "idx-{fraction}.npy"), "--fraction", 0.5)
    assert outcome.code == 0, outcome.err
    assert [len(np.load(tmp_path / f"idx-{f}.npy")) for f in ("0.25", "0.5")] == [30, 60]


def test_dry_run_writes_nothing(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    outcome = kdfast(*command(tiny, cache, tmp_path / "no" / "idx.npy"), "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "would keep 30" in outcome.out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--fraction", "1"), 3, "nothing to choose"),
        (("--option", "score=nosuch"), 2, "must be one of"),
        (("--option", "stepps=3"), 2, "did you mean 'steps'"),
        (("--option", "alpha=2"), 2, "from 0 to 1"),
        (("--rule", "hard"), 2, "omit --rule"),
    ],
)
def test_rejects_bad_options(
    kdfast, tiny: Path, cache: Path, tmp_path: Path, more: tuple[str, str], code: int, message: str
) -> None:
    arguments = list(command(tiny, cache, tmp_path / "idx.npy"))
    if more[0] == "--fraction":
        arguments[arguments.index("--fraction") + 1] = more[1]
        more = ()
    outcome = kdfast(*arguments, *more)
    assert outcome.code == code, outcome.err
    assert message in outcome.err
    assert "Traceback" not in outcome.err
    assert not list(tmp_path.glob("idx*"))


def test_rejects_unusable_caches(kdfast, tiny: Path, teacher: Path, cache: Path, tmp_path: Path) -> None:
    from kdfast.nets.checkpoint import load_model

    part = tmp_path / "part"
    build_cache(open_source(tiny), load_model(teacher), part, n_views=1, ids=np.arange(60))
    outcome = kdfast(*command(tiny, part, tmp_path / "idx.npy"))
    assert outcome.code == 3
    assert "lacks 60 of the samples" in outcome.err
    bare = tmp_path / "bare"
    build_cache(open_source(tiny), load_model(teacher), bare, n_views=1)
    (bare / "features.npy").unlink()
    outcome = kdfast(*command(tiny, bare, tmp_path / "idx.npy"))
    assert outcome.code == 3
    assert "features.npy" in outcome.err
    arguments = [a for a in command(tiny, bare, tmp_path / "idx.npy") if a not in ("--cache", bare)]
    outcome = kdfast(*arguments)
    assert outcome.code == 2
    assert "needs a teacher's cache" in outcome.err
    assert not list(tmp_path.glob("idx*"))


def test_report_rejects_other_files(kdfast, tiny: Path, tmp_path: Path) -> None:
    assert kdfast("prune", "--data", tiny, "--fraction", 0.5, "--out", tmp_path / "idx.npy").code == 0
    outcome = kdfast("report", "if-beta", tmp_path / "idx.json", "--out", tmp_path / "page.html")
    assert outcome.code == 3
    assert "is not the provenance of" in outcome.err
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(("bad", "message"), [(1, "nothing to choose"), (0.01, "class")])
def test_rejects_a_bad_fraction_before_any_search(
    kdfast, tiny: Path, cache: Path, tmp_path: Path, bad: float, message: str
) -> None:
    outcome = kdfast(*command(tiny, cache, tmp_path / "idx-{fraction}.npy"), "--fraction", bad)
    assert outcome.code == 3
    assert message in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_keeps_a_finished_fraction_when_the_next_is_interrupted(
    kdfast, tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupt_step(monkeypatch, 5)
    outcome = kdfast(*command(tiny, cache, tmp_path / "idx-{fraction}.npy"), "--fraction", 0.5)
    assert outcome.code == 75
    assert sorted(path.name for path in tmp_path.iterdir()) == ["idx-0.25.json", "idx-0.25.npy", "idx-0.5.search.json"]


def test_sweep_rejects_a_fraction_of_one(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    outcome = kdfast("sweep", "--data", tiny, "--cache", cache, "--student", "resnet8", "--batch-size", 20,
                     "--methods", "if-beta", "--fractions", "0.5,1", "--out", tmp_path / "s", "--dry-run")  # fmt: skip
    assert outcome.code == 3
    assert "nothing to choose" in outcome.err


def test_sweep_runs_again_if_the_influence_has_another_l2(
    kdfast, tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods = "random,el2n,if-beta:inner_steps=5,steps=1,if-beta:inner_steps=5,score=residual,steps=1"
    command = ("sweep", "--data", tiny, "--cache", cache, "--student", "resnet8", "--steps", 6, "--batch-size", 10,
               "--methods", methods, "--fractions", 0.25, "--kd", "on", "--out", tmp_path)  # fmt: skip
    outcome = kdfast(*command)
    assert outcome.code == 0, outcome.err
    monkeypatch.setattr(select, "DEFAULT_L2", 0.5)
    assert "would run 1 of 4 rows" in kdfast(*command, "--dry-run").out
    assert kdfast(*command).code == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["method"] for row in rows[4:]] == ["if-beta:inner_steps=5,steps=1"]
    assert rows[4]["chosen"]["influence_l2"] == 0.5
    (section,) = group_rows(rows)
    assert [row["settings"]["scores"].get("influence_l2") for row in section.rows if "chosen" in row] == [0.5, None]
