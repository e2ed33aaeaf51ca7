"""`kdfast teacher train` on a part of the data, and students on samples that the teacher has not seen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.readers.registry import open_source

QUICK = ("--net", "resnet8", "--epochs", 2, "--batch-size", 10)


def weights_of(path: Path) -> str:
    return torch.load(path, weights_only=True)["digest"]


def test_fraction_trains_on_the_samples_of_a_random_subset(kdfast, tiny: Path, tmp_path: Path) -> None:
    command = ("teacher", "train", "--data", tiny, *QUICK, "--seed", 3)
    out, part = tmp_path / "T.pt", tmp_path / "T.pt.subset.npy"
    assert kdfast(*command, "--fraction", 0.5, "--out", out, "--dry-run").code == 0
    assert not list(tmp_path.iterdir())
    outcome = kdfast(*command, "--fraction", 0.5, "--out", out)
    assert outcome.code == 0, outcome.err
    assert "60 samples kept" in outcome.out
    subset = tmp_path / "idx.npy"
    assert kdfast("prune", "--data", tiny, "--fraction", 0.5, "--seed", 3, "--out", subset).code == 0
    assert part.read_bytes() == subset.read_bytes()
    assert kdfast(*command, "--subset", subset, "--out", tmp_path / "S.pt").code == 0
    assert weights_of(tmp_path / "S.pt") == weights_of(out)
    assert not (tmp_path / "S.pt.subset.npy").exists()
    before = part.stat().st_mtime_ns
    assert kdfast(*command, "--fraction", 0.5, "--out", out).code == 0
    assert part.stat().st_mtime_ns == before

    other = kdfast(*command, "--fraction", 0.4, "--out", out)
    assert (other.code, "other settings" in other.err) == (2, True)
    whole = kdfast(*command, "--out", out, "--force")
    assert whole.code == 0, whole.err
    assert "120 samples kept" in whole.out
    assert not part.exists()


def test_a_students_subset_is_disjoint_from_the_teachers(kdfast, tiny: Path, tmp_path: Path) -> None:
    labels = open_source(tiny).train.labels
    seen = np.concatenate([np.flatnonzero(labels == label)[:25] for label in range(3)])
    np.save(tmp_path / "seen.npy", seen)
    command = ("prune", "--data", tiny, "--exclude", tmp_path / "seen.npy", "--out", tmp_path / "idx.npy")
    outcome = kdfast(*command, "--fraction", 0.2)
    assert outcome.code == 0, outcome.err
    assert "kept 24 of 120 training samples (random, balanced, seed 0); 8 per class" in outcome.out
    kept = np.load(tmp_path / "idx.npy")
    assert not np.intersect1d(kept, seen).size
    assert json.loads((tmp_path / "idx.json").read_text())["parameters"]["excluded"]["samples"] == 75
    many = kdfast(*command, "--fraction", 0.5)
    assert many.code == 3
    assert (
        many.err
        == "kdfast: --fraction is 0.5, 60 of 120 samples, and --exclude leaves 45: keep fewer, or exclude fewer\n"
    )
    assert np.array_equal(np.load(tmp_path / "idx.npy"), kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--fraction", 0.5, "--subset", "idx.npy"), "--subset and --fraction both choose the samples to train on"),
        (("--fraction", 0.05), "--fraction is 0.05, which keeps 6 of 120 samples, fewer than one batch of 10"),
        (("--fraction", 1.5), "--fraction is 1.5: must be above 0 and at most 1"),
        (("--subset", "missing.npy"), "missing.npy"),
    ],
)
def test_one_line_says_what_is_wrong(kdfast, tiny: Path, tmp_path: Path, options: tuple, message: str) -> None:
    outcome = kdfast("teacher", "train", "--data", tiny, *QUICK, *options, "--out", tmp_path / "T.pt")
    assert outcome.code in (2, 3)
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert not list(tmp_path.iterdir())
