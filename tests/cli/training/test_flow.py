"""All commands from data to student, on small data."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.cli.program import app


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_all_steps_from_data_to_student(kdfast, tiny: Path, tmp_path: Path) -> None:
    teacher, cache, subset = tmp_path / "t.pt", tmp_path / "cache", tmp_path / "idx.npy"
    short = ("--epochs", 2, "--batch-size", 10, "--lr", 0.05)
    outcome = kdfast("teacher", "train", "--data", tiny, "--net", "resnet8", *short, "--out", teacher)
    assert outcome.code == 0, outcome.err
    outcome = kdfast("prune", "--data", tiny, "--method", "random", "--fraction", 0.25, "--out", subset)
    assert outcome.code == 0, outcome.err
    assert "kept 30 of 120" in outcome.out
    assert np.load(subset).dtype == np.int64
    outcome = kdfast("cache", "--data", tiny, "--teacher", teacher, "--subset", subset, "--views", 4, "--out", cache)
    assert outcome.code == 0, outcome.err
    assert kdfast("cache", "verify", "--cache", cache, "--data", tiny, "--teacher", teacher).code == 0
    run = tmp_path / "run"
    command = ("distill", "--data", tiny, "--subset", subset, "--cache", cache, "--student", "resnet8", *short)
    outcome = kdfast(*command, "--out", run)
    assert outcome.code == 0, outcome.err
    result = read(run / "result.json")
    assert result["kept"] == 30
    assert result["steps"] == 6
    assert result["views"] == 4
    assert result["targets"] == "cache"
    assert 0 < result["alpha"] < 1
    assert {"test_top1", "test_top5", "seconds", "images_per_second", "cost_seconds"} <= result.keys()
    assert {"train", "evaluate", "cache", "prune", "open data"} <= result["cost_seconds"].keys()
    assert read(run / "status.json")["state"] == "finished"
    assert read(run / "config.json")["alpha"] == result["alpha"]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 6
    outcome = kdfast("eval", "--data", tiny, "--model", run / "student.pt", "--json")
    assert json.loads(outcome.out)["top1"] == result["test_top1"]
    before = (run / "student.pt").stat().st_mtime_ns
    assert kdfast(*command, "--out", run).code == 0
    assert (run / "student.pt").stat().st_mtime_ns == before, "a finished run must not train again"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "student.pt", weights_only=True)["state_dict"]


def test_cached_and_online_teacher_give_the_same_losses(
    kdfast, tiny: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    common = ("distill", "--data", tiny, "--student", "resnet8", "--epochs", 2, "--batch-size", 30, "--views", 3)
    assert kdfast(*common, "--alpha", 1, "--cache", cache, "--out", tmp_path / "cached").code == 0
    assert kdfast(*common, "--alpha", 1, "--teacher", teacher, "--out", tmp_path / "online").code == 0
    cached, online = (read(tmp_path / name / "result.json") for name in ("cached", "online"))
    assert (cached["targets"], online["targets"]) == ("cache", "online teacher")
    losses = [
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("cached", "online")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)


def test_alpha_0_needs_no_teacher_and_alpha_changes_the_weights(
    kdfast, tiny: Path, cache: Path, tmp_path: Path
) -> None:
    common = ("distill", "--data", tiny, "--student", "resnet8", "--epochs", 1, "--batch-size", 30, "--views", 3)
    assert kdfast(*common, "--alpha", 0, "--out", tmp_path / "plain").code == 0
    assert kdfast(*common, "--alpha", 1, "--cache", cache, "--out", tmp_path / "kd").code == 0
    assert read(tmp_path / "plain" / "result.json")["targets"] is None
    assert not torch.equal(weights(tmp_path / "plain")["fc.weight"], weights(tmp_path / "kd")["fc.weight"])


def test_all_loaders_give_the_same_weights(kdfast, tiny: Path, cache: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    assert kdfast("data", "convert", tiny, tmp_path / "betons").code == 0
    common = ("distill", "--student", "resnet8", "--epochs", 2, "--batch-size", 25, "--cache", cache)
    for name, loader in (("a", "ffcv"), ("b", "resident")):
        outcome = kdfast(*common, "--data", tmp_path / "betons", "--loader", loader, "--out", tmp_path / name)
        assert outcome.code == 0, outcome.err
        assert read(tmp_path / name / "result.json")["loader"] == loader
    for name, weight in weights(tmp_path / "a").items():
        assert torch.equal(weight, weights(tmp_path / "b")[name])


def test_config_file_sets_defaults_and_options_override_it(kdfast, tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {tiny}\nstudent: resnet8\nbatch-size: 30\nepochs: 1\nalpha: 0\nseed: 3\n")
    outcome = kdfast("distill", "--config", config, "--seed", 5, "--out", tmp_path / "run")
    assert outcome.code == 0, outcome.err
    resolved = read(tmp_path / "run" / "config.json")
    assert (resolved["batch_size"], resolved["epochs"], resolved["seed"]) == (30, 1, 5)


@pytest.mark.parametrize("command", ["prune", "cache", "distill", "convert", "train"])
def test_dry_runs_write_nothing(kdfast, command: str, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    arguments = {
        "prune": ("prune", "--data", tiny, "--fraction", 0.5, "--out", tmp_path / "idx.npy"),
        "cache": ("cache", "--data", tiny, "--teacher", teacher, "--out", tmp_path / "cache"),
        "distill": ("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, "--out", tmp_path / "run"),
        "convert": ("data", "convert", tiny, tmp_path / "betons"),
        "train": ("teacher", "train", "--data", tiny, "--net", "resnet8", "--out", tmp_path / "t.pt"),
    }[command]
    outcome = kdfast(*arguments, "--dry-run")
    assert outcome.code == 0, outcome.err
    assert outcome.out
    assert list(tmp_path.iterdir()) == []


def commands(group, prefix: tuple[str, ...] = ()):
    yield from ((*prefix, c.name) for c in group.registered_commands)
    for sub in group.registered_groups:
        yield (*prefix, sub.name)
        yield from commands(sub.typer_instance, (*prefix, sub.name))


@pytest.mark.parametrize("words", sorted(commands(app)), ids=" ".join)
def test_every_command_has_help(kdfast, words: tuple[str, ...]) -> None:
    outcome = kdfast(*words, "--help")
    assert outcome.code == 0
    assert len(outcome.out.split("\n\n")[1].split()) >= 4, "a sentence about what it does"


def test_doctor_prints_the_backend_of_kd_loss(kdfast) -> None:
    outcome = kdfast("doctor")
    assert outcome.code == 0
    assert "kd_loss, cpu -> native" in outcome.out


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_trains(kdfast, tiny: Path, cache: Path, tmp_path: Path, precision: str) -> None:
    outcome = kdfast("distill", "--data", tiny, "--student", "resnet8", "--cache", cache, "--epochs", 2,
                     "--batch-size", 30, "--precision", precision, "--out", tmp_path / "run")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert weights(tmp_path / "run")["fc.weight"].dtype == torch.float32
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_writes_tensorboard_events_on_request(kdfast, tiny: Path, tmp_path: Path) -> None:
    outcome = kdfast("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, "--epochs", 1, "--batch-size", 30,
                     "--tensorboard", "--out", tmp_path / "run")  # fmt: skip
    if importlib.util.find_spec("tensorboard") is None:
        assert outcome.code == 2
        assert "--track tensorboard needs a missing package: pip install tensorboard" in outcome.err
        assert not (tmp_path / "run").exists()
    else:
        assert outcome.code == 0, outcome.err
        assert list((tmp_path / "run" / "tensorboard").glob("events.*"))


def test_distills_from_a_cache_of_the_most_probable_classes(
    kdfast, tiny: Path, teacher: Path, cache: Path, tmp_path: Path
) -> None:
    top = tmp_path / "top"
    command = ("cache", "--data", tiny, "--teacher", teacher, "--views", 3, "--temperature", 2)
    # Three views of 120 samples, each with a logit, a class id and a tail of 2 bytes.
    assert "logits-*.npy 2.16 kB, " in kdfast(*command, "--top-k", 1, "--out", top, "--dry-run").out
    made = kdfast(*command, "--top-k", 1, "--out", top)
    assert made.code == 0, made.err
    assert "x 1 classes" in made.out
    assert kdfast("cache", "verify", "--cache", top, "--data", tiny, "--teacher", teacher).code == 0
    common = ("distill", "--data", tiny, "--student", "resnet8", "--epochs", 2, "--batch-size", 30, "--alpha", 1)
    for name, folder in (("whole", cache), ("kept", top)):
        done = kdfast(*common, "--temperature", 2, "--cache", folder, "--out", tmp_path / name)
        assert done.code == 0, done.err
    whole, kept = (
        [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "kept")
    )
    # The omitted classes are filled from the unaugmented images, which the views resemble.
    assert kept[0] == pytest.approx(whole[0], rel=0.01)
    assert kept[0] != whole[0]
    refused = kdfast(*common, "--cache", top, "--out", tmp_path / "other")
    assert refused.code == 3
    assert "pass --temperature 2" in refused.err
    assert not (tmp_path / "other").exists()
    assert kdfast(*command, "--top-k", 99, "--out", tmp_path / "none").code == 2
    assert "--top-k" in kdfast(*command, "--out", tmp_path / "none").err
    without = kdfast("cache", "--data", tiny, "--teacher", teacher, "--views", 3, "--out", top)
    assert without.code == 3
    assert "top_k" in without.err
