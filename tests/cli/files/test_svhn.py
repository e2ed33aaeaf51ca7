"""The flow on a set in the format of the official SVHN files: compressed MATLAB 5, digit 0 as label 10."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    root = tmp_path / "svhn"
    root.mkdir()
    for name, count in (("train_32x32.mat", 200), ("test_32x32.mat", 60)):
        labels = rng.permutation(np.arange(count) % 10 + 1).astype(np.uint8)
        images = rng.integers(0, 60, (32, 32, 3, count), dtype=np.uint8)
        images[:, :, :, np.arange(count)] += (18 * (labels % 10)).astype(np.uint8)
        savemat(root / name, {"X": images, "y": labels[:, None]}, do_compression=True, format="5")
    return root


def test_prune_cache_and_distill(kdfast, folder: Path, tmp_path: Path) -> None:
    idx, out = tmp_path / "idx.npy", tmp_path / "run"
    quick = ("--epochs", 1, "--batch-size", 32)
    trained = kdfast("teacher", "train", "--data", folder, "--net", "resnet8", *quick, "--out", tmp_path / "T.pt")
    assert trained.code == 0, trained.err
    pruned = kdfast("prune", "--data", folder, "--fraction", 0.5, "--out", idx)
    assert pruned.code == 0, pruned.err
    assert "kept 100 of 200 training samples (random, balanced, seed 0); 10 per class" in pruned.out
    cached = kdfast("cache", "--data", folder, "--teacher", tmp_path / "T.pt", "--subset", idx, "--views", 3, "--out",
                    tmp_path / "cache")  # fmt: skip
    assert cached.code == 0, cached.err
    assert "100 samples x 3 views x 10 classes" in cached.out
    distilled = kdfast("distill", "--data", folder, "--subset", idx, "--cache", tmp_path / "cache", "--student",
                       "resnet8", *quick, "--out", out)  # fmt: skip
    assert distilled.code == 0, distilled.err
    config = json.loads((out / "config.json").read_text())
    assert config["augmentation"].items() >= {"kind": "shift", "size": [32, 32], "pad": 4, "flip": False}.items()
    assert json.loads((out / "result.json").read_text())["kept"] == 100
