"""`kdfast prune` and `kdfast report scores` from the command line: files, provenance, rejected commands."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.readers.registry import open_source
from kdfast.nets import forward_with_features
from kdfast.nets.checkpoint import load_model
from kdfast.pruning.rules.apply import select_subset
from kdfast.pruning.rules.registry import RULES
from kdfast.pruning.score_file import ScoreFile, write_scores


@pytest.fixture
def scores(tiny: Path, tmp_path: Path) -> Path:
    source = open_source(tiny)
    values = np.random.default_rng(0).random(len(source.train))
    extras = {"mean_p": np.random.default_rng(1).random(len(source.train))}
    path = tmp_path / "in" / "scores.npz"
    write_scores(path, ScoreFile(values, "dual", source.fingerprint, extras, {"window": 10}, seconds=2.0))
    return path


@pytest.mark.parametrize("rule", sorted(RULES))
def test_applies_every_rule_to_a_score_file(
    kdfast, tiny: Path, scores: Path, cache: Path, tmp_path: Path, rule: str
) -> None:
    arguments = ("prune", "--data", tiny, "--scores", scores, "--cache", cache, "--rule", rule, "--fraction", 0.25)
    outcome = kdfast(*arguments, "--seed", 3, "--out", tmp_path / "idx.npy")
    assert outcome.code == 0, outcome.err
    assert "kept 30 of 120" in outcome.out
    about = json.loads((tmp_path / "idx.json").read_text())
    held = np.load(scores)
    assert about["method"] == "dual"
    assert about["scores"] == json.loads(str(held["about"]))["digest"]
    assert about["seed"] == 3
    assert about["seconds"] > about["score_seconds"] == 2.0
    assert about["parameters"]["rule"] == rule
    assert about["parameters"]["options"].keys() == RULES[rule].options.keys()
    features = np.load(cache / "features.npy")
    labels = open_source(tiny).train.labels
    extras = {"mean_p": held["extra.mean_p"]}
    expected = select_subset(held["scores"], labels, 0.25, rule=rule, seed=3, features=features, extras=extras).ids
    assert (np.load(tmp_path / "idx.npy") == expected).all()


def test_default_rule_is_the_published_one(
    kdfast, tiny: Path, scores: Path, cache: Path, teacher: Path, tmp_path: Path
) -> None:
    assert (
        kdfast("prune", "--data", tiny, "--scores", scores, "--fraction", 0.25, "--out", tmp_path / "a.npy").code == 0
    )
    assert json.loads((tmp_path / "a.json").read_text())["parameters"]["rule"] == "dual"
    command = ("prune", "--data", tiny, "--method", "moderate", "--cache", cache, "--fraction", 0.25)
    command += ("--teacher", teacher)  # which the score does not read
    assert kdfast(*command, "--out", tmp_path / "b.npy").code == 0
    about = json.loads((tmp_path / "b.json").read_text())
    assert (about["method"], about["parameters"]["rule"]) == ("moderate", "moderate")
    assert set(about["sources"]) == {"cache"}


def test_cached_features_come_from_normalized_images(tiny: Path, teacher: Path, cache: Path) -> None:
    """D2 measures distances between the teacher's features of images normalized as in its training."""
    model, images = load_model(teacher), open_source(tiny).train.read(np.arange(20))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.normalization.mean, model.normalization.std))
    with torch.no_grad():
        right, wrong = (forward_with_features(model.net.eval(), x)[1].numpy() for x in ((pixels - mean) / std, pixels))
    held = np.load(cache / "features.npy")[:20]
    np.testing.assert_allclose(held, right, rtol=1e-3, atol=1e-4)
    assert np.abs(held - wrong).max() > 0.1


def test_selects_several_fractions_in_one_call(kdfast, tiny: Path, scores: Path, tmp_path: Path) -> None:
    out = tmp_path / "idx-{fraction}.npy"
    command = ("prune", "--data", tiny, "--scores", scores, "--rule", "hard")
    outcome = kdfast(*command, "--fraction", 0.1, "--fraction", 0.5, "--out", out)
    assert outcome.code == 0, outcome.err
    small, large = (np.load(tmp_path / f"idx-{f}.npy") for f in ("0.1", "0.5"))
    assert (len(small), len(large)) == (12, 60)
    assert set(small) < set(large)
    assert kdfast(*command, "--fraction", 0.1, "--out", tmp_path / "one.npy").code == 0
    assert (np.load(tmp_path / "one.npy") == small).all()


def test_passes_options_to_rule_and_score(kdfast, tiny: Path, scores: Path, cache: Path, tmp_path: Path) -> None:
    command = ("prune", "--data", tiny, "--method", "moderate", "--cache", cache, "--fraction", 0.25, "--rule", "beta")
    options = ("--option", "a=3", "--option", "b=1.5", "--score-option", "fidelity=code")
    assert kdfast(*command, *options, "--out", tmp_path / "idx.npy").code == 0
    parameters = json.loads((tmp_path / "idx.json").read_text())["parameters"]
    assert parameters["options"] == {"a": 3.0, "b": 1.5}
    assert parameters["score"]["fidelity"] == "code"


def test_reads_the_fraction_from_a_config_file(kdfast, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(f"data: {tiny}\nfraction: 0.25\nout: {tmp_path / 'idx.npy'}\n")
    outcome = kdfast("prune", "--config", tmp_path / "c.yaml")
    assert outcome.code == 0, outcome.err
    assert len(np.load(tmp_path / "idx.npy")) == 30


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--fraction", "0.25", "--rule", "hrad"), 2, "did you mean 'hard'"),
        (("--fraction", "0.25", "--rule", "beta", "--option", "c=1"), 2, "no option 'c'"),
        (("--fraction", "0.25", "--rule", "beta", "--option", "a"), 2, "write it as name=value"),
        (("--fraction", "0.25", "--rule", "d2"), 2, "--cache"),
        (("--fraction", "0.25", "--method", "el2n"), 2, "--scores excludes --method"),
        (("--fraction", "0.25", "--fraction", "0.5"), 2, "put {fraction} into the name"),
        (("--fraction", "0.25", "--fraction", "0.25"), 2, "appears twice"),
        (("--fraction", "0.25", "--equal", "--unbalanced"), 2, "exclude each other"),
        (("--fraction", "0.001"), 3, "keeps none"),
        (("--fraction", "0.01"), 3, "classes empty"),
        (("--fraction", "1.5"), 3, "above 0 and at most 1"),
    ],
)
def test_rejected_commands_write_nothing(
    kdfast, tiny: Path, scores: Path, tmp_path: Path, flags, code: int, message: str
) -> None:
    before = sorted(tmp_path.iterdir())
    outcome = kdfast("prune", "--data", tiny, "--scores", scores, *flags, "--out", tmp_path / "idx.npy")
    assert outcome.code == code
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_rule_as_method_is_named(kdfast, tiny: Path, tmp_path: Path) -> None:
    outcome = kdfast("prune", "--data", tiny, "--fraction", 0.25, "--method", "bws", "--out", tmp_path / "idx.npy")
    assert outcome.code == 2
    assert "bws is a rule, not a method: pass it as --rule, with a score as --method" in outcome.err


def test_bad_fraction_among_good_ones_writes_nothing(kdfast, tiny: Path, scores: Path, tmp_path: Path) -> None:
    command = ("prune", "--data", tiny, "--scores", scores, "--fraction", 0.5, "--fraction", 0.001)
    assert kdfast(*command, "--out", tmp_path / "idx-{fraction}.npy").code == 3
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_rejects_foreign_or_invalid_score_files(kdfast, tiny: Path, tmp_path: Path) -> None:
    n, fingerprint = 120, open_source(tiny).fingerprint
    write_scores(tmp_path / "data.npz", ScoreFile(np.ones(n), "el2n", "0" * 64))
    write_scores(tmp_path / "length.npz", ScoreFile(np.ones(n - 1), "el2n", fingerprint))
    write_scores(tmp_path / "nan.npz", ScoreFile(np.ones(n), "el2n", fingerprint))
    with np.load(tmp_path / "nan.npz") as held:
        arrays = {**held, "scores": np.where(np.arange(n) < 2, np.nan, 1.0)}
    np.savez(tmp_path / "nan.npz", **arrays)
    for name, message in (("data", "other data"), ("length", "119"), ("nan", "not finite"), ("missing", "there is no")):
        command = ("prune", "--data", tiny, "--scores", tmp_path / f"{name}.npz", "--fraction", 0.5)
        outcome = kdfast(*command, "--out", tmp_path / "idx.npy")
        assert outcome.code == 3
        assert message in outcome.err
        assert not (tmp_path / "idx.npy").exists()


def test_writes_a_page_about_scores(kdfast, tiny: Path, scores: Path, cache: Path, tmp_path: Path) -> None:
    assert (
        kdfast("prune", "--data", tiny, "--scores", scores, "--fraction", 0.25, "--out", tmp_path / "idx.npy").code == 0
    )
    command = ("report", "scores", scores, "--data", tiny, "--cache", cache, "--subset", tmp_path / "idx.npy")
    outcome = kdfast(*command, "--scores", scores, "--out", tmp_path / "page.html")
    assert outcome.code == 0, outcome.err
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "Teacher accuracy on the training split" in page
    outcome = kdfast(*command, "--out", tmp_path / "page.pdf")
    assert outcome.code == 2
    assert ".html" in outcome.err


def test_provenance_names_the_cache_of_the_features(kdfast, tiny, cache, tmp_path) -> None:
    scores, idx = tmp_path / "s.npz", tmp_path / "idx.npy"
    assert kdfast("score", "--data", tiny, "--method", "random", "--out", scores).code == 0
    ran = kdfast("prune", "--data", tiny, "--scores", scores, "--cache", cache, "--rule", "d2", "--fraction", 0.5,
                 "--out", idx)  # fmt: skip
    assert ran.code == 0, ran.err
    digest = hashlib.sha256((cache / "manifest.json").read_bytes()).hexdigest()
    assert json.loads(idx.with_suffix(".json").read_text())["sources"]["cache"] == digest
