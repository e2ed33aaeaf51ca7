"""kdfast cache on large images, at several temperatures, and of features."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An .npz of 30 classes: 30 training and 30 test images of 64 x 64."""
    path = tmp_path_factory.mktemp("large") / "large.npz"
    images, labels = np.random.default_rng(0).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8), np.arange(30)
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    return path


@pytest.fixture(scope="module")
def large_teacher(large: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained teacher of that data."""
    import torch

    from kdfast.data.views import Normalization
    from kdfast.nets import build_net
    from kdfast.nets.checkpoint import Model, save_model

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("large") / "t.pt"
    norm = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    save_model(path, Model(build_net("resnet8", 30).eval(), "resnet8", 30, tuple(map(str, range(30))), norm))
    return path


@pytest.mark.parametrize(
    ("options", "views", "row"),
    [
        ((), 50, 42),
        (("--temperature", "1,2,4"), 50, 46),
        (("--views", 0, "--top-k", 0), 128, 60),
        (("--views", 3, "--top-k", 5), 3, 22),
        (("--kind", "features"), 50, 128),
    ],
    ids=str,
)
def test_dry_run_of_large_images(kdfast, large, large_teacher, tmp_path, options, views, row) -> None:
    command = ("cache", "--data", large, "--teacher", large_teacher, "--out", tmp_path / "c", *options)
    ran = kdfast(*command, "--dry-run", "--json")
    assert ran.code == 0, ran.err
    plan = json.loads(ran.out)
    assert (plan["views"], plan["files"]["logits-*.npy"]) == (views, 30 * views * row)
    assert plan["files"]["identity_logits.npy"] == 30 * 30 * 4
    assert plan["bytes"] == sum(plan["files"].values())
    assert plan["free_bytes"] > 0
    assert not (tmp_path / "c").exists()


def test_small_images_keep_everything(kdfast, tiny, teacher, tmp_path) -> None:
    ran = kdfast("cache", "--data", tiny, "--teacher", teacher, "--out", tmp_path / "c", "--dry-run", "--json")
    plan = json.loads(ran.out)
    assert plan["files"]["logits-*.npy"] == 120 * plan["views"] * 3 * 2
    assert plan["views"] > 3


def test_one_cache_serves_its_temperatures(kdfast, tiny, teacher, tmp_path) -> None:
    made = ("cache", "--data", tiny, "--teacher", teacher, "--views", 3, "--out", tmp_path / "c")
    assert kdfast(*made, "--top-k", 1, "--temperature", "4,1").code == 0
    run = ("distill", "--data", tiny, "--student", "resnet8", "--epochs", 1, "--batch-size", 60, "--cache")
    for temperature in (1, 4):
        ran = kdfast(*run, tmp_path / "c", "--temperature", temperature, "--out", tmp_path / str(temperature))
        assert ran.code == 0, ran.err
    refused = kdfast(*run, tmp_path / "c", "--temperature", 2, "--out", tmp_path / "2")
    assert refused.code == 3
    assert "summed at temperature 1, 4, but the run has 2: pass --temperature one of these" in refused.err
    assert not (tmp_path / "2").exists()


def test_features_train_as_logits_do(kdfast, tiny, teacher, tmp_path) -> None:
    losses = {}
    for kind in ("logits", "features"):
        made = ("cache", "--data", tiny, "--teacher", teacher, "--views", 3, "--dtype", "float32", "--kind", kind)
        ran = kdfast(*made, "--out", tmp_path / kind)
        assert ran.code == 0, ran.err
        run = ("distill", "--data", tiny, "--student", "resnet8", "--epochs", 2, "--batch-size", 60, "--alpha", 1)
        ran = kdfast(*run, "--temperature", 1.7, "--cache", tmp_path / kind, "--out", tmp_path / f"run-{kind}")
        assert ran.code == 0, ran.err
        lines = (tmp_path / f"run-{kind}" / "metrics.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in lines]
    assert all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(*losses.values(), strict=True))
    scored = kdfast(
        "prune", "--data", tiny, "--cache", tmp_path / "features", "--method", "influence", "--fraction", 0.5,
        "--out", tmp_path / "idx.npy",
    )  # fmt: skip
    assert scored.code == 0, scored.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--kind", "hidden"), "--kind is 'hidden': pass"),
        (("--kind", "features", "--top-k", 2), "--top-k chooses among logits, and --kind is features"),
        (("--top-k", 2, "--temperature", "1,x"), "--temperature is '1,x': pass numbers separated by commas"),
        (("--top-k", 2, "--temperature", "0"), "--temperature"),
        (("--top-k", 0, "--temperature", "2"), "--temperature is given without --top-k"),
    ],
    ids=str,
)
def test_refuses(kdfast, tiny, teacher, tmp_path, options, message) -> None:
    ran = kdfast("cache", "--data", tiny, "--teacher", teacher, "--out", tmp_path / "c", *options)
    assert ran.code == 2
    assert message in ran.err
    assert not (tmp_path / "c").exists()
