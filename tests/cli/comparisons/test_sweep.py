"""`kdfast sweep`: a resumable grid of runs that processes share, in one table."""

import functools
import json
import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from kdfast.errors import DivergedError
from kdfast.pruning.options import Option
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.selector import SubsetSelector
from kdfast.pruning.selectors import SELECTORS
from kdfast.sweep import session as sessions
from kdfast.sweep.summary import compare, group_rows

GRID = ("--student", "resnet8", "--steps", 6, "--batch-size", 10, "--lr", 0.05)


def rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]


def places(out: Path) -> list[tuple]:
    return sorted((r["method"], r["fraction"], r["kd"], r["seed"]) for r in rows(out))


@pytest.fixture
def start(fork) -> Callable:
    """Start the command as a process in its own session."""
    return functools.partial(fork, "sweep")


def test_writes_rows_table_and_plot(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "sweep"
    command = ("sweep", "--data", tiny, "--cache", cache, *GRID, "--out", out)
    axes = ("--methods", "random,el2n,moderate", "--fractions", ".25,.5", "--kd", "both", "--seeds", "4")
    dry = kdfast(*command, *axes, "--dry-run")
    assert dry.code == 0, dry.err
    assert "would run 12 of 12 rows" in dry.out
    assert not out.exists()
    outcome = kdfast(*command, *axes)
    assert outcome.code == 0, outcome.err
    expected = [(m, f, kd, 4) for m in ("el2n", "moderate", "random") for f in (0.25, 0.5) for kd in (False, True)]
    assert places(out) == sorted(expected)
    for row in rows(out):
        assert row["kept"] == 120 * row["fraction"]
        assert row["steps"] == 6
        assert row["alpha"] == (0 if not row["kd"] else 0.875 if row["fraction"] == 0.25 else pytest.approx(2 / 3))
        assert row["views"] == (3 if row["kd"] else 9)
        assert 0 <= row["test_top1"] <= 100
        assert len(row["subset"]) == 64
        stages = {"scores", "selection"} | ({"cache"} if row["kd"] or row["method"] != "random" else set())
        assert row["costs"].keys() == stages
    of = {(r["method"], r["fraction"], r["kd"]): r["subset"] for r in rows(out)}
    assert of["random", 0.25, True] == of["random", 0.25, False]
    assert of["el2n", 0.25, True] != of["moderate", 0.25, True]
    assert (out / "table.md").read_text() in outcome.out
    assert "| random |" in outcome.out
    assert (out / "plot.png").stat().st_size > 10_000
    page = (out / "report.html").read_text()
    assert all(f"{row['test_top1']:.2f}" in page for row in rows(out))
    assert sorted(p.name for p in out.iterdir() if p.name[0] != ".") == [
        "plot.png",
        "report.html",
        "results.jsonl",
        "runs",
        "table.md",
    ]
    assert list((out / "runs").iterdir()) == []


def test_row_equals_prune_and_distill(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    out, idx = tmp_path / "sweep", tmp_path / "idx.npy"
    outcome = kdfast("sweep", "--data", tiny, "--cache", cache, *GRID, "--methods", "random", "--fractions", 0.25,
                     "--seeds", 3, "--keep-runs", "--out", out)  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert kdfast("prune", "--data", tiny, "--fraction", 0.25, "--seed", 3, "--out", idx).code == 0
    common = ("distill", "--data", tiny, "--subset", idx, "--student", "resnet8", "--epochs", 2, "--batch-size", 10,
              "--lr", 0.05, "--schedule", "cosine", "--seed", 3)  # fmt: skip
    assert kdfast(*common, "--cache", cache, "--out", tmp_path / "kd").code == 0
    assert kdfast(*common, "--alpha", 0, "--out", tmp_path / "plain").code == 0
    for row in rows(out):
        alone = json.loads((tmp_path / ("kd" if row["kd"] else "plain") / "result.json").read_text())
        assert row["weights"] == alone["weights"]
        assert row["test_top1"] == alone["test_top1"]
    assert len(list(out.glob("runs/*/student.pt"))) == 2


def test_every_run_has_the_steps_that_were_asked_for(kdfast, tiny: Path, tmp_path: Path) -> None:
    out, idx = tmp_path / "sweep", tmp_path / "run"
    # 30 samples are 3 batches, all 120 are 12: 6 steps are two epochs of the former, half an epoch of the latter.
    command = ("sweep", "--data", tiny, *GRID, "--kd", "off", "--fractions", ".25,1", "--warmup-epochs", 0.25)
    dry = kdfast(*command, "--out", out, "--dry-run")
    assert "120 samples, 6 steps in 1 epoch" in dry.out
    outcome = kdfast(*command, "--out", out)
    assert outcome.code == 0, outcome.err
    subset, everything = sorted(rows(out), key=lambda row: row["fraction"])
    assert (subset["steps"], subset["epochs"], subset["settings"].get("cut")) == (6, 2, None)
    assert (everything["steps"], everything["epochs"], everything["settings"].get("cut")) == (6, None, True)
    alone = kdfast("distill", "--data", tiny, "--student", "resnet8", "--steps", 6, "--batch-size", 10, "--lr", 0.05,
                   "--schedule", "cosine", "--warmup-epochs", 0.25, "--alpha", 0, "--out", idx)  # fmt: skip
    assert alone.code == 0, alone.err
    assert json.loads((idx / "result.json").read_text())["weights"] == everything["weights"]
    assert "all data, same steps (6 steps)" in (out / "report.html").read_text()
    both = kdfast("distill", "--data", tiny, "--student", "resnet8", "--steps", 6, "--epochs", 2, "--out", idx)
    assert (both.code, "--epochs and --steps both say how long to train" in both.err) == (2, True)


def test_rows_of_rounded_steps_do_not_stand_beside_exact_ones(kdfast, tiny: Path, tmp_path: Path) -> None:
    command = ("sweep", "--data", tiny, *GRID, "--steps", 7, "--kd", "off", "--fractions", ".25,1", "--out", tmp_path)
    assert kdfast(*command, "--methods", "random").code == 0
    exact = rows(tmp_path)
    assert [row["settings"]["cut"] for row in exact] == [True, True]
    # As an earlier version wrote them: 6 steps are two epochs of 30 samples, 12 are one of all.
    earlier = [
        {**row, "key": f"{number:064x}", "steps": steps, "epochs": epochs,
         "settings": {name: value for name, value in row["settings"].items() if name != "cut"}}
        for number, (row, steps, epochs) in enumerate(zip(exact, (6, 12), (2, 1), strict=True))
    ]  # fmt: skip
    section = group_rows([*earlier, *exact])[0]
    assert (section.rows, section.left_out) == (exact, 2)
    section = group_rows([*exact, *earlier])[0]
    assert (section.rows, section.left_out) == (exact, 2)
    (comparison,) = compare(group_rows(earlier))
    assert [run.same_steps for run in comparison.full_runs(kd=False)] == [()]
    (comparison,) = compare(group_rows(exact))
    assert [run.same_steps for run in comparison.full_runs(kd=False)] == [(0.25,)]


def test_phases_that_do_not_fit_are_refused_before_the_first_run(
    kdfast, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    command = ("sweep", "--data", tiny, "--cache", cache, *GRID, "--fractions", ".25,1", "--kd", "on")
    refused = kdfast(*command, "--out", tmp_path, "--kd-term", "dist", "--kd-warmup-epochs", 2)
    assert (refused.code, "--kd-warmup-epochs is 2.0 of 0.5 epochs" in refused.err) == (2, True), refused.err
    assert not (tmp_path / "results.jsonl").exists()


def test_the_warm_up_may_take_several_epochs(kdfast, tiny: Path, tmp_path: Path) -> None:
    command = ("sweep", "--data", tiny, *GRID, "--kd", "off", "--fractions", ".25", "--out", tmp_path)
    outcome = kdfast(*command, "--warmup-epochs", 2)
    assert outcome.code == 0, outcome.err
    refused = kdfast(*command, "--warmup-epochs", 3)
    assert (refused.code, "--warmup-epochs is 3.0 of 2 epochs" in refused.err) == (2, True), refused.err


def test_runs_only_what_has_no_row(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    command = ("sweep", "--data", tiny, "--cache", cache, *GRID, "--kd", "on", "--out", tmp_path)
    assert kdfast(*command, "--fractions", 0.25).code == 0
    first = (tmp_path / "results.jsonl").read_bytes()
    again = kdfast(*command, "--fractions", 0.25)
    assert again.code == 0
    assert (tmp_path / "results.jsonl").read_bytes() == first
    assert kdfast(*command, "--fractions", "0.25,0.5", "--methods", "random,el2n/hard").code == 0
    assert (tmp_path / "results.jsonl").read_bytes().startswith(first)
    assert len(rows(tmp_path)) == 4
    assert kdfast(*command, "--fractions", 0.25, "--alpha", 0.5).code == 0
    assert len(rows(tmp_path)) == 5
    table = (tmp_path / "table.md").read_text()
    assert "alpha auto" in table
    assert "alpha 0.5" in table
    (tmp_path / "table.md").unlink()
    outcome = kdfast("sweep", "--report-only", "--out", tmp_path)
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "table.md").read_text() == table


def test_opens_inputs_and_computes_scores_once(kdfast, tiny: Path, cache: Path, tmp_path: Path, monkeypatch) -> None:
    opened = []
    real = sessions.open_source
    monkeypatch.setattr(sessions, "open_source", lambda *a, **k: opened.append(a) or real(*a, **k))
    scored, score = [], ScoreSources.score
    monkeypatch.setattr(
        ScoreSources, "score", lambda sources, name, **how: scored.append(name) or score(sources, name, **how)
    )
    outcome = kdfast("sweep", "--data", tiny, "--cache", cache, *GRID, "--methods", "random,el2n", "--fractions",
                     "0.25,0.5", "--out", tmp_path)  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert len(rows(tmp_path)) == 8
    assert len(opened) == 1
    assert sorted(scored) == ["el2n", "random"]


def test_score_files_serve_as_methods(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    scores = tmp_path / "s.npz"
    assert kdfast("score", "--data", tiny, "--cache", cache, "--method", "el2n", "--out", scores).code == 0
    outcome = kdfast("sweep", "--data", tiny, "--cache", cache, *GRID, "--kd", "off", "--fractions", 0.25,
                     "--scores", f"mine={scores}", "--methods", "mine,el2n,mine/easy,mine/beta:a=2,b=5",
                     "--out", tmp_path / "sweep")  # fmt: skip
    assert outcome.code == 0, outcome.err
    subsets = {row["method"]: row["subset"] for row in rows(tmp_path / "sweep")}
    assert subsets["mine"] == subsets["el2n"]
    assert len(set(subsets.values())) == 3
    assert "mine/beta:a=2,b=5" in subsets


def test_kill_9_loses_and_repeats_no_row(start, tiny: Path, cache: Path, tmp_path: Path) -> None:
    out, rng = tmp_path / "sweep", random.Random(0)
    command = ("--data", tiny, "--cache", cache, *GRID, "--steps", 40, "--fractions", 0.5, "--seeds", "0,1,2", "--out",
               out)  # fmt: skip
    before = b""
    for _ in range(2):
        process = start(*command)
        while process.poll() is None and len(content(out)) <= len(before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        process.kill()
        assert "Traceback" not in process.communicate()[1]
        assert content(out).startswith(before)
        before = content(out)
    before = b"".join(before.splitlines(keepends=True)[:5])  # leave at least one of the six rows to run
    (out / "results.jsonl").write_bytes(before + b'{"key": "torn')
    process = start(*command)
    _, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert (out / "results.jsonl").read_bytes().startswith(before)
    assert places(out) == sorted(("random", 0.5, kd, s) for kd in (True, False) for s in (0, 1, 2))
    assert list((out / "runs").iterdir()) == []


def content(out: Path) -> bytes:
    return (out / "results.jsonl").read_bytes() if (out / "results.jsonl").exists() else b""


def test_concurrent_calls_share_the_rows(start, tiny: Path, cache: Path, tmp_path: Path) -> None:
    command = ("--data", tiny, "--cache", cache, *GRID, "--steps", 30, "--fractions", "0.25,0.5", "--seeds", "0,1",
               "--out", tmp_path)  # fmt: skip
    calls = [start(*command), start(*command, "--jobs", 2)]
    told = [call.communicate(timeout=900) for call in calls]
    assert [call.returncode for call in calls] == [0, 0], told
    assert len(rows(tmp_path)) == len(set(places(tmp_path))) == 8
    assert len({row["subset"] for row in rows(tmp_path)}) == 4, "each seed draws its own subsets"
    for out, _ in told:
        assert "| random |" in out


def has_trained(out: Path) -> bool:
    """Whether a run has logged a step: a run that has not begun has nothing to save."""
    return any(path.read_bytes() for path in out.glob("runs/*/metrics.jsonl"))


def test_ctrl_c_keeps_finished_rows(start, tiny: Path, cache: Path, tmp_path: Path) -> None:
    command = ("--data", tiny, "--cache", cache, *GRID, "--steps", 3000, "--seeds", "0,1,2", "--fractions", 0.5)
    for jobs in (1, 2):
        out = tmp_path / str(jobs)
        process = start(*command, "--jobs", jobs, "--out", out)
        while not has_trained(out) and process.poll() is None:
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 75, err
        assert err.splitlines()[-1].endswith("run the same command again to resume"), err
        assert err.count("run the same command again") == 1, err
        assert "Traceback" not in err
        assert list(out.glob("runs/*/checkpoints/latest.json")), "interrupted runs can be resumed"


def test_diverged_run_does_not_stop_others(kdfast, tiny: Path, cache: Path, tmp_path: Path, monkeypatch) -> None:
    real = sessions.train

    def train(plan, folder, watch):
        if plan.config.alpha == 0 and plan.config.seed == 0:
            raise DivergedError("the loss is not finite at step 1")
        return real(plan, folder, watch)

    monkeypatch.setattr(sessions, "train", train)
    command = (
        "sweep",
        "--data",
        tiny,
        "--cache",
        cache,
        *GRID,
        "--fractions",
        0.25,
        "--seeds",
        "0,1",
        "--out",
        tmp_path,
    )
    outcome = kdfast(*command)
    assert outcome.code == 5
    assert re.search(r"1 of 4 runs diverged: random f=0.25 plain seed 0: the loss", outcome.err)
    assert len(rows(tmp_path)) == 3


BAD = {
    "method": (("--methods", "random,el2m"), 2, r"no method is named 'el2m': did you mean 'el2n'\? known: random"),
    "rule": (("--methods", "el2n/hart"), 2, "did you mean 'hard'"),
    "option": (("--methods", "el2n/beta:c=1"), 2, "no option 'c'"),
    "option value": (("--methods", "el2n/beta:a=-1"), 2, "a=-1"),
    "score option": (("--methods", "influence:kinds=self"), 2, "did you mean 'kind'"),
    "method twice": (("--methods", "el2n,el2n/hard"), 2, "names el2n twice"),
    "no dynamics": (("--methods", "forgetting"), 2, "with kdfast dynamics and pass --dynamics"),
    "mean p": (("--methods", "el2n/dual"), 2, "needs mean_p"),
    "fraction too small": (("--fractions", "0.001"), 3, "keeps none"),
    "fraction empties classes": (("--fractions", "0.01"), 3, "classes empty"),
    "fraction under a batch": (("--fractions", "0.05"), 3, "fewer than one batch of 10"),
    "fraction over 1": (("--fractions", "0.1,1.5"), 2, "--fractions contains 1.5"),
    "fraction no number": (("--fractions", "0.1,x"), 2, "--fractions is '0.1,x'"),
    "fraction twice": (("--fractions", "0.5,0.50"), 2, "pass distinct numbers"),
    "seeds": (("--seeds", "0,-1"), 2, "--seeds is -1"),
    "kd": (("--kd", "maybe"), 2, "--kd is 'maybe'"),
    "alpha 0": (("--alpha", 0), 2, "set --kd to off"),
    "alpha": (("--alpha", "much"), 2, "--alpha is 'much'"),
    "views": (("--views", 9), 2, "the cache holds 3"),
    "student": (("--student", "resnet9"), 2, "did you mean 'resnet"),
    "precision": (("--precision", "fp8"), 2, "--precision is 'fp8'"),
    "scores": (("--scores", "mine"), 2, "pass NAME=FILE"),
    "the baseline's name": (
        ("--scores", "random=/nowhere.npz"),
        2,
        "--scores names a file random, .* use another name",
    ),
    "score file": (("--scores", "mine=/nowhere.npz"), 3, "there is no /nowhere.npz"),
    "jobs": (("--jobs", "many"), 2, "--jobs is 'many': pass a number from 1 to 1024, or auto"),
    "no jobs": (("--jobs", 0), 2, "--jobs is '0'"),
    "dynamics": (("--dynamics", "/nowhere"), 3, "/nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_rejects_bad_input_in_one_line_and_writes_nothing(
    kdfast, tiny: Path, cache: Path, tmp_path: Path, name: str
) -> None:
    options, code, pattern = BAD[name]
    command = ("sweep", "--data", tiny, "--cache", cache, *GRID, "--fractions", 0.5, "--out", tmp_path / "out")
    outcome = kdfast(*command, *options)
    assert outcome.code == code, outcome.err
    assert re.search(pattern, outcome.err), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert not (tmp_path / "out").exists()


def test_names_missing_inputs(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for command, message in (
        (("--out", out), "needs --data and --student"),
        (("--data", tiny, *GRID, "--out", out), "need --cache"),
        (
            ("--data", tiny, *GRID, "--kd", "off", "--methods", "moderate", "--out", out),
            "with kdfast cache and pass --cache",
        ),
        (("--data", tiny, *GRID, "--kd", "off", "--methods", "d2", "--out", out), "with kdfast cache and pass --cache"),
        (("--report-only", "--out", out), "has no row"),
    ):
        outcome = kdfast("sweep", *command)
        assert outcome.code in (2, 3), outcome.err
        assert message in outcome.err
        assert outcome.err.count("\n") == 1
    assert not out.exists()


def test_leaves_foreign_results_unchanged(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text("my results\n")
    outcome = kdfast("sweep", "--data", tiny, "--cache", cache, *GRID, "--fractions", 0.5, "--out", tmp_path)
    assert outcome.code == 3
    assert "line 1" in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["results.jsonl"]


def test_rejects_a_cache_of_a_subset(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "idx.npy", np.arange(60))
    part = tmp_path / "part"
    assert kdfast("cache", "--data", tiny, "--teacher", teacher, "--subset", tmp_path / "idx.npy", "--views", 2,
                  "--out", part).code == 0  # fmt: skip
    outcome = kdfast("sweep", "--data", tiny, "--cache", part, *GRID, "--fractions", 0.5, "--out", tmp_path / "out")
    assert outcome.code == 3
    assert "lacks 60 of the samples" in outcome.err
    assert not (tmp_path / "out").exists()


def test_selector_runs_once_for_both_runs(kdfast, tiny: Path, cache: Path, tmp_path: Path, monkeypatch) -> None:
    asked = []

    def choose(inputs):
        asked.append((inputs.fraction, inputs.seed, dict(inputs.options)))
        inputs.state.write_text("where the search is")
        inputs.progress(1, 2, "half way")
        return np.arange(inputs.seed, 30 + inputs.seed), {"why": [inputs.seed]}

    monkeypatch.setitem(
        SELECTORS, "first", SubsetSelector(choose, "keeps the first", {"k": Option(1, "nothing", integer=True)})
    )
    command = (
        "sweep",
        "--data",
        tiny,
        "--cache",
        cache,
        *GRID,
        "--fractions",
        0.25,
        "--seeds",
        "0,1",
        "--out",
        tmp_path,
    )
    outcome = kdfast(*command, "--methods", "random,first:k=2")
    assert outcome.code == 0, outcome.err
    assert asked == [(0.25, 0, {"k": 2}), (0.25, 1, {"k": 2})]
    chosen = {(row["seed"], row["kd"]): row["chosen"] for row in rows(tmp_path) if row["method"] == "first:k=2"}
    assert chosen == {(seed, kd): {"why": [seed]} for seed in (0, 1) for kd in (True, False)}
    assert "first:k=2" in outcome.out
    assert list((tmp_path / "runs").iterdir()) == [], "the state of a search is deleted once its row exists"


def test_terms_of_the_loss_apply_to_runs_with_the_teacher(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    command = (
        "sweep",
        "--data",
        tiny,
        "--cache",
        cache,
        *GRID,
        "--methods",
        "random",
        "--fractions",
        ".5",
        "--seeds",
        0,
    )
    plain, out = tmp_path / "plain", tmp_path / "terms"
    assert kdfast(*command, "--kd", "both", "--out", plain).code == 0
    terms = ("--kd-term", "dkd:beta=2", "--kd-weight", 0.5, "--ce-weight", 1, "--alpha", 0, "--kd-warmup-epochs", 1)
    assert kdfast(*command, *terms, "--kd", "both", "--out", out).code == 0
    (before, before_plain), (after, after_plain) = (sorted(rows(x), key=lambda r: not r["kd"]) for x in (plain, out))
    assert after_plain["key"] == before_plain["key"]
    assert not before["settings"].keys() & {"ce", "terms", "terms_warmup_epochs"}
    assert after["settings"]["terms"][0]["options"]["beta"] == 2
    assert after["weights"] != before["weights"]
    refused = kdfast(*command, "--kd", "on", "--alpha", 0, "--out", tmp_path / "x")
    assert refused.code == 2
    assert "--alpha is 0, which trains without the teacher" in refused.err


def test_methods_that_lack_an_input_are_refused_before_any_run(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    for method, message in (
        ("d2:cut_by=aum", "rule 'd2' with cut_by=aum needs the area under the margin: score with the method d2"),
        ("grand:network=full", "needs a network .* kdfast sweep takes the file of kdfast score"),
    ):
        command = ("sweep", "--data", tiny, "--cache", cache, *GRID, "--methods", f"random,{method}", "--kd", "off")
        ran = kdfast(*command, "--fractions", ".5", "--seeds", "0", "--out", tmp_path / "out")
        assert ran.code == 2, ran.err
        assert re.search(message, ran.err), ran.err
        assert ran.err.count("\n") == 1
        assert not (tmp_path / "out").exists()
