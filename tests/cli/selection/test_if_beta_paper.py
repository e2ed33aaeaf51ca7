"""`kdfast prune --method if-beta` with preset=paper, and scores from files, the registry and a teacher's file."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.pruning import request
from kdfast.pruning.if_beta.selector import costs
from kdfast.pruning.if_beta.stages import TwoStages, mode_and_sharpness
from kdfast.teacher.flatten import FlattenConfig

PAPER = ("--option", "preset=paper", "--option", "held=0.2", "--option", "mu_step=0.5", "--option", "steps=2",
         "--option", "repeats=2", "--option", "draws=4")  # fmt: skip
QUICK = ("--option", "steps=2", "--option", "inner_steps=5", "--option", "held=0.2")


@pytest.fixture(autouse=True)
def _no_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "distillation_seconds", lambda *_: 1000.0)
    monkeypatch.setattr(costs, "teacher_epoch", lambda *_: {"network": "resnet8", "seconds": 2.0})


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> list[FlattenConfig]:
    """Flatten for three iterations; return the settings that every flattening should have had."""
    made: list[FlattenConfig] = []

    def config(**settings: object) -> FlattenConfig:
        made.append(FlattenConfig(**settings))
        return dataclasses.replace(made[-1], iterations=3)

    config.held = FlattenConfig.held  # type: ignore[attr-defined]
    monkeypatch.setattr(request, "FlattenConfig", config)
    return made


@pytest.fixture(scope="module")
def scores(tiny: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from kdfast.data.readers.registry import open_source
    from kdfast.pruning.score_file import write_scores
    from kdfast.pruning.scores.compute import ScoreSources

    path = tmp_path_factory.mktemp("scores") / "el2n.npz"
    write_scores(path, ScoreSources.open(open_source(tiny), cache=cache).score("el2n", seed=0))
    return path


def command(tiny: Path, cache: Path, out: Path, *more: object) -> tuple[object, ...]:
    head = ("prune", "--data", tiny, "--cache", cache, "--method", "if-beta", "--fraction", 0.25)
    return (*head, "--seed", 3, "--out", out, *more)


def record(path: Path) -> dict:
    return json.loads(path.with_suffix(".json").read_text())


def test_flattens_scores_and_searches_in_one_command(
    kdfast, tiny: Path, cache: Path, teacher: Path, tmp_path: Path, brief: list[FlattenConfig]
) -> None:
    out = tmp_path / "idx-{fraction}.npy"
    outcome = kdfast(*command(tiny, cache, out, *PAPER, "--teacher", teacher, "--fraction", 0.5))
    assert outcome.code == 0, outcome.err
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "idx-0.25.json",
        "idx-0.25.npy",
        "idx-0.5.json",
        "idx-0.5.npy",
    ]
    # Once for both fractions, on the held-out part of the search, in less than four epochs with the scores.
    assert [(c.held, c.seed, c.iterations) for c in brief] == [(0.2, 3, 500)]
    about = record(tmp_path / "idx-0.25.npy")
    found = about["if-beta"]
    assert about["parameters"]["score"]["method"] == "influence-fvm"
    assert about["parameters"]["score"]["network"].startswith("flattened, sharpness fsam")
    assert about["parameters"]["score"]["fisher"] == "validation"
    assert about["scores"] == record(tmp_path / "idx-0.5.npy")["scores"]
    assert found["preset"] == "paper"
    assert len(found["path"]) == 3 + 2 + 1
    assert mode_and_sharpness(*found["learned"])[0] in (0, 0.5, 1)
    seconds = [found[f"{name}_seconds"] for name in ("flatten", "score", "search")]
    assert min(seconds) > 0
    assert found["percent_of_distillation"] == pytest.approx(sum(seconds) / 10)
    assert found["epochs"] == pytest.approx(sum(seconds) / 2)

    page = tmp_path / "page.html"
    assert kdfast("report", "if-beta", tmp_path / "idx-0.25.json", "--out", page).code == 0
    text = page.read_text()
    assert "Flattening" in text
    assert "Mode mu, sharpness tau" in text


def test_takes_a_flat_teacher_as_it_is(kdfast, tiny: Path, cache: Path, teacher: Path, tmp_path: Path) -> None:
    flat, fvm = tmp_path / "flat.pt", tmp_path / "fvm.npz"
    flatten = ("teacher", "flatten", "--data", tiny, "--teacher", teacher, "--iterations", 2, "--held", 0.2)
    assert kdfast(*flatten, "--out", flat).code == 0
    assert (
        kdfast("score", "--data", tiny, "--method", "influence-fvm", "--teacher", flat, "--seed", 3, "--out", fvm).code
        == 0
    )
    one, two = tmp_path / "one.npy", tmp_path / "two.npy"
    for out, source in ((one, ("--teacher", flat)), (two, ("--scores", fvm))):
        outcome = kdfast(*command(tiny, cache, out, *PAPER, *source))
        assert outcome.code == 0, outcome.err
    assert (np.load(one) == np.load(two)).all()
    assert record(one)["scores"] == record(two)["scores"]
    assert record(one)["if-beta"]["flatten_seconds"] > 0
    assert set(record(one)["sources"]) == set(record(two)["sources"]) == {"cache", "teacher"}


def test_a_rule_selects_by_the_score_of_a_network(kdfast, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    """Without IF-Beta, too, prune takes the network of a score."""
    grand = ("--method", "grand", "--score-option", "network=full", "--teacher", teacher)
    assert kdfast("prune", "--data", tiny, "--fraction", 0.25, "--out", tmp_path / "one.npy", *grand).code == 0
    scored = ("score", "--data", tiny, "--method", "grand", "--option", "network=full", "--teacher", teacher)
    assert kdfast(*scored, "--out", tmp_path / "grand.npz").code == 0
    scores = ("--scores", tmp_path / "grand.npz")
    assert kdfast("prune", "--data", tiny, "--fraction", 0.25, "--out", tmp_path / "two.npy", *scores).code == 0
    assert (np.load(tmp_path / "one.npy") == np.load(tmp_path / "two.npy")).all()


@pytest.mark.parametrize("preset", [PAPER, QUICK], ids=["paper", "kdfast"])
def test_ranks_by_a_score_file_or_a_registered_score(
    kdfast, tiny: Path, cache: Path, tmp_path: Path, scores: Path, preset: tuple[str, ...]
) -> None:
    file, named = tmp_path / "file.npy", tmp_path / "named.npy"
    for out, source in (
        (file, ("--scores", scores)),
        (named, ("--option", "score=el2n", "--score-option", "use=cache")),
    ):
        outcome = kdfast(*command(tiny, cache, out, *preset, *source))
        assert outcome.code == 0, outcome.err
    assert (np.load(file) == np.load(named)).all()
    assert record(file)["if-beta"]["ends"] == record(named)["if-beta"]["ends"]
    assert record(file)["parameters"]["options"]["score"] == "el2n.npz"
    assert record(named)["parameters"]["score"]["use"] == "cache"
    assert record(file)["sources"] == record(named)["sources"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--option", "preset=paper"), "ranks by influence-fvm, which needs a network: pass --teacher"),
        (("--option", "preset=papers"), "must be one of kdfast, paper"),
        (("--option", "mu_step=.1"), "has no option 'mu_step' with preset=kdfast: omit it, or set preset=paper"),
        ((*PAPER, "--option", "inner_steps=3"), "has no option 'inner_steps' with preset=paper"),
        ((*PAPER, "--option", "steeps=3"), "did you mean 'steps'"),
        (("--scores", "x.npz", "--option", "score=self"), "--scores excludes the option score of if-beta"),
        (("--scores", "x.npz", "--score-option", "use=cache"), "takes no --score-option: omit them"),
        (("--option", "score=self", "--score-option", "use=cache"), "ranks by self, which takes no --score-option"),
        (("--option", "score=el2n", "--score-option", "ues=cache"), "did you mean 'use'"),
        (("--option", "score=aum"), "needs training dynamics"),
    ],
)
def test_rejects(kdfast, tiny: Path, cache: Path, tmp_path: Path, more: tuple[str, ...], message: str) -> None:
    outcome = kdfast(*command(tiny, cache, tmp_path / "idx.npy", *more))
    assert outcome.code == 2, outcome.err
    assert message in outcome.err
    assert not list(tmp_path.iterdir())


def test_dry_run_flattens_nothing(
    kdfast, tiny: Path, cache: Path, teacher: Path, tmp_path: Path, brief: list[FlattenConfig]
) -> None:
    outcome = kdfast(*command(tiny, cache, tmp_path / "idx.npy", *PAPER, "--teacher", teacher, "--dry-run"))
    assert outcome.code == 0, outcome.err
    assert "score 120 samples and keep 30 of them" in outcome.out
    assert not brief
    assert not list(tmp_path.iterdir())


def test_keeps_scores_and_flat_network_of_an_interrupted_command(
    kdfast, tiny: Path, cache: Path, teacher: Path, tmp_path: Path, brief, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kdfast.pruning.scores.compute import ScoreSources

    whole, parts = tmp_path / "whole.npy", tmp_path / "parts.npy"
    assert kdfast(*command(tiny, cache, whole, *PAPER, "--teacher", teacher)).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(TwoStages, "take_step", partial(interrupt, []))
        assert kdfast(*command(tiny, cache, parts, *PAPER, "--teacher", teacher)).code == 75
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts.search.npz", "parts.search.pt"]
    with monkeypatch.context() as patch:
        patch.setattr(ScoreSources, "score", partial(interrupt, []))  # not called: the scores are read
        outcome = kdfast(*command(tiny, cache, parts, *PAPER, "--teacher", teacher))
    assert outcome.code == 0, outcome.err
    assert sorted(p.name for p in tmp_path.glob("parts*")) == ["parts.json", "parts.npy"]
    assert (np.load(parts) == np.load(whole)).all()
    assert record(parts)["scores"] == record(whole)["scores"]


def test_timing_a_network_leaves_the_random_numbers() -> None:
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3 * 8 * 8, 2))
    state = torch.get_rng_state()
    assert costs._epoch_seconds(net, 100, 2, (8, 8), torch.device("cpu"), distilled=False) > 0
    assert torch.equal(torch.get_rng_state(), state)


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_survives_kill_9(tiny: Path, cache: Path, tmp_path: Path) -> None:
    options = ("--option", "preset=paper", "--option", "score=self", "--option", "held=0.2", "--option", "draws=64")
    whole, parts = tmp_path / "whole.npy", tmp_path / "parts.npy"
    run = [sys.executable, "-m", "kdfast"]
    subprocess.run([*run, *map(str, command(tiny, cache, whole, *options))], check=True, timeout=300)
    state, kills = parts.with_suffix(".search.json"), 0
    while kills < 4:
        process = subprocess.Popen([*run, *map(str, command(tiny, cache, parts, *options))])
        before = state.read_bytes() if state.exists() else b""
        while process.poll() is None and (not state.exists() or state.read_bytes() == before):
            time.sleep(0.01)
        time.sleep(0.02 * kills)
        if process.poll() is not None:
            break
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills
    subprocess.run([*run, *map(str, command(tiny, cache, parts, *options))], check=True, timeout=300)
    assert parts.read_bytes() == whole.read_bytes()
    old, new = (record(path)["if-beta"] for path in (whole, parts))
    assert [new[name] for name in ("path", "rewards", "trials", "gain")] == [
        old[name] for name in ("path", "rewards", "trials", "gain")
    ]


def test_a_sweeps_rows_are_those_of_the_scores(kdfast, tiny: Path, cache: Path, tmp_path: Path, scores: Path) -> None:
    options = "draws=4,held=0.2,mu_step=0.5,preset=paper,repeats=2"
    methods = f"random,if-beta:{options},score=mine,steps=1"
    sweep = ("sweep", "--data", tiny, "--cache", cache, "--student", "resnet8", "--steps", 6, "--batch-size", 10,
             "--fractions", 0.25, "--kd", "on", "--out", tmp_path / "s")  # fmt: skip
    outcome = kdfast(*sweep, "--methods", methods, "--scores", f"mine={scores}")
    assert outcome.code == 0, outcome.err
    row = json.loads((tmp_path / "s" / "results.jsonl").read_text().splitlines()[1])
    assert row["method"] == f"if-beta:{options},score=mine,steps=1"
    assert row["settings"]["scores"]["scores mine"] == json.loads(str(np.load(scores)["about"]))["digest"]
    assert row["chosen"]["preset"] == "paper"

    other = tmp_path / "other.npz"
    assert kdfast("score", "--data", tiny, "--method", "random", "--out", other).code == 0
    assert "would run 1 of 2 rows" in kdfast(*sweep, "--methods", methods, "--scores", f"mine={other}", "--dry-run").out
    outcome = kdfast(*sweep, "--methods", "if-beta:preset=paper", "--dry-run")
    assert outcome.code == 2
    assert "needs a network" in outcome.err
    outcome = kdfast(*sweep, "--methods", "if-beta:preset=paper,score=mien", "--scores", f"mine={scores}", "--dry-run")
    assert outcome.code == 2
    assert "score=mien" in outcome.err


def test_help_lists_the_options_of_each_preset(kdfast) -> None:
    text = kdfast("prune", "--method", "if-beta", "--help-options").out
    ours, papers = text.split("Method if-beta, preset=paper")
    assert "Method if-beta, preset=kdfast" in ours
    assert "inner_steps=" in ours
    assert "inner_steps=" not in papers
    assert "mu_step=" in papers
