"""Scores, subsets and logits that people already have, in the commands."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.readers.registry import open_source

N = 120


@pytest.fixture
def margins(tmp_path: Path) -> Path:
    """Margins as the code of CCS writes them: high for easy samples."""
    path = tmp_path / "in" / "data-score.pickle"
    path.parent.mkdir()
    values = torch.from_numpy(np.random.default_rng(0).normal(size=N)).float()
    path.write_bytes(pickle.dumps({"el2n": values.abs(), "accumulated_margin": values}))
    return path


def test_prune_shows_and_records_how_it_read_own_scores(kdfast, tiny: Path, margins: Path, tmp_path: Path) -> None:
    command = ("prune", "--data", tiny, "--scores", margins, "--fraction", 0.25, "--balance", "none")
    ran = kdfast(*command, "--key", "accumulated_margin", "--higher", "easy", "--out", tmp_path / "idx.npy")
    assert ran.code == 0, ran.err
    assert "data-score.pickle:accumulated_margin: one score for each sample, in order; higher = easier" in ran.out
    values = pickle.loads(margins.read_bytes())["accumulated_margin"].numpy()
    assert set(np.load(tmp_path / "idx.npy")) == set(np.argsort(values)[: N // 4])
    about = json.loads((tmp_path / "idx.json").read_text())
    assert about["method"] == "data-score.pickle:accumulated_margin"
    assert about["parameters"]["score"] == {
        "higher": "easy", "key": "accumulated_margin", "read_as": "one score for each sample, in order",
    }  # fmt: skip
    ran = kdfast(*command, "--key", "el2n", "--out", tmp_path / "el2n.npy")
    assert "higher = harder; if not: --higher easy" in ran.out


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        ((), 2, "2 arrays that may be the scores: pass one of el2n, accumulated_margin as --key"),
        (("--key", "accumulated_margin"), 2, "pass --higher easy or hard"),
        (("--key", "el2n", "--higher", "up"), 2, "--higher is 'up': pass one of hard, easy"),
    ],
)
def test_prune_asks_for_what_the_file_does_not_say(kdfast, tiny, margins, tmp_path, flags, code, message) -> None:
    ran = kdfast("prune", "--data", tiny, "--scores", margins, "--fraction", 0.25, *flags, "--out", tmp_path / "i.npy")
    assert (ran.code, ran.err.count("\n")) == (code, 1)
    assert message in ran.err
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_key_and_higher_need_scores(kdfast, tiny: Path, tmp_path: Path) -> None:
    ran = kdfast("prune", "--data", tiny, "--fraction", 0.5, "--higher", "easy", "--out", tmp_path / "i.npy")
    assert ran.code == 2
    assert "--higher says how to read --scores, which is not given" in ran.err


def test_report_compares_own_scores_and_subsets(kdfast, tiny: Path, margins: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.arange(N) % 3 == 0)
    command = ("report", "scores", margins, "--data", tiny, "--scores", margins, "--subset", tmp_path / "mask.npy")
    keys = ("--key", "el2n", "--key", "accumulated_margin")
    ran = kdfast(*command, *keys, "--higher", "hard", "--out", tmp_path / "page.html")
    assert ran.code == 0, ran.err
    page = (tmp_path / "page.html").read_text()
    assert "data-score.pickle:el2n" in page
    assert "data-score.pickle:accumulated_margin" in page
    ran = kdfast(*command, *keys, "--key", "el2n", "--out", tmp_path / "other.html")
    assert ran.code == 2
    assert "--key is given 3 times for 2 score files" in ran.err


def test_sweep_reads_own_scores(kdfast, tiny: Path, margins: Path, tmp_path: Path) -> None:
    command = ("sweep", "--data", tiny, "--student", "resnet8", "--kd", "off", "--fractions", 0.5, "--batch-size", 20)
    command = (*command, "--methods", "mine", "--scores", f"mine={margins}", "--out", tmp_path / "sweep", "--dry-run")
    ran = kdfast(*command, "--key", "mine=accumulated_margin", "--higher", "mine=easy")
    assert ran.code == 0, ran.err
    assert "higher = easier, so kdfast turns them round" in ran.out
    ran = kdfast(*command, "--key", "yours=el2n")
    assert ran.code == 2
    assert "--key: --scores has no file named 'yours'" in ran.err


def test_imported_logits_serve_scores_and_verification(kdfast, tiny: Path, tmp_path: Path) -> None:
    labels = open_source(tiny).train.labels
    classes = int(labels.max()) + 1
    logits = 4 * np.eye(classes)[labels] + np.random.default_rng(0).normal(size=(N, classes))
    np.save(tmp_path / "z.npy", logits)
    cache = tmp_path / "cache"
    ran = kdfast("cache", "import", tmp_path / "z.npy", "--data", tiny, "--out", cache)
    assert ran.code == 0, ran.err
    assert f"imported {N} samples x 1 views x {classes} classes, without features; top-1: " in ran.out
    ran = kdfast("cache", "verify", "--cache", cache, "--data", tiny)
    assert ran.code == 0, ran.err
    assert "its logits were imported" in ran.out
    ran = kdfast("score", "--data", tiny, "--cache", cache, "--method", "el2n", "--out", tmp_path / "s.npz")
    assert ran.code == 0, ran.err
    softmax = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    expected = np.linalg.norm(softmax - np.eye(classes)[labels], axis=1)
    np.testing.assert_allclose(np.load(tmp_path / "s.npz")["scores"], expected, atol=1e-6)
    for flags, code in ((("--method", "grand"), 2), (("--method", "el2n", "--rule", "d2"), 3)):
        ran = kdfast("prune", "--data", tiny, "--cache", cache, *flags, "--fraction", 0.5, "--out", tmp_path / "i.npy")
        assert ran.code == code
        assert "features" in ran.err
    ran = kdfast("distill", "--data", tiny, "--cache", cache, "--student", "resnet8", "--kd-term", "pkt", "--epochs", 1,
                 "--batch-size", 20, "--out", tmp_path / "run", "--dry-run")  # fmt: skip
    assert ran.code == 3
    assert "imported logits without features" in ran.err
    ran = kdfast("distill", "--data", tiny, "--cache", cache, "--student", "resnet8", "--epochs", 1, "--batch-size", 20,
                 "--out", tmp_path / "run", "--dry-run")  # fmt: skip
    assert ran.code == 0, ran.err
    np.save(tmp_path / "bad.npy", np.where(np.arange(N)[:, None] == 7, np.nan, logits))
    ran = kdfast("cache", "import", tmp_path / "bad.npy", "--data", tiny, "--out", tmp_path / "other")
    assert (ran.code, ran.err.count("\n")) == (3, 1)
    assert "not finite, first at row 7" in ran.err
    assert not (tmp_path / "other").exists()
