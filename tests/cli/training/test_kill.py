"""After kill -9 at random moments, the same command writes the same bytes and accepts no partial file."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch


def finish(fork, command: list[object]) -> float:
    """Run the command to the end and return the seconds it took."""
    started = time.perf_counter()
    process = fork(*command)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return time.perf_counter() - started


def end_with_kills(fork, command: list[object], most: int, seconds: float, rng: random.Random) -> int:
    """Start the command until it ends on its own; kill it up to `most` times after a share of its usual time."""
    kills = 0
    while kills < most:
        process = fork(*command)
        try:
            _, err = process.communicate(timeout=rng.uniform(0.2, 0.9) * seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, err
        return kills
    finish(fork, command)
    return kills


def state_of(folder: Path) -> dict[str, object]:
    """Return the files that must not depend on kills."""
    found: dict[str, object] = {}
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder).as_posix()
        if file.name.startswith(".kdfast") or not file.is_file():
            continue
        assert ".kdtmp-" not in file.name, "a finished command leaves no temporary file"
        if name == "student.pt":
            content = torch.load(file, weights_only=True)["state_dict"]
            found[name] = {k: v.numpy().tobytes() for k, v in content.items()}
        elif name == "metrics.jsonl":
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: row[k] for k in ("step", "epoch", "loss", "lr")} for row in rows]
        elif file.suffix == ".npy":
            found[name] = file.read_bytes()
    return found


def check(fork, make, tmp_path: Path, kills: int, same) -> None:
    """Kill `kills` times in total; every resumed run must end like the uninterrupted one."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    seconds = finish(fork, make(whole))
    rng = random.Random(kills)
    while kills > 0:
        hits = end_with_kills(fork, make(cut), kills, seconds, rng)
        same(whole, cut)
        shutil.rmtree(cut)
        kills -= hits
        if not hits:
            seconds *= 0.7  # The machine is faster than in the first run.


def same_files(whole: Path, cut: Path) -> None:
    expected, got = state_of(whole), state_of(cut)
    assert expected
    assert got.keys() == expected.keys()
    for name in expected:
        assert got[name] == expected[name], name


def training(tiny: Path, cache: Path):
    def make(out: Path) -> list[object]:
        return ["distill", "--data", tiny, "--student", "resnet8", "--cache", cache, "--epochs", 30,
                "--batch-size", 25, "--log-every", 7, "--checkpoint-seconds", 0.05, "--out", out]  # fmt: skip

    return make


def caching(teacher: Path, tmp_path: Path):
    rng = np.random.default_rng(0)
    n = 1200
    data = tmp_path / "big.npz"
    images, labels = rng.integers(0, 255, (n, 12, 12, 3), dtype=np.uint8), np.arange(n) % 3
    np.savez(data, train_images=images, train_labels=labels, test_images=images[:50], test_labels=labels[:50])

    def make(out: Path) -> list[object]:
        return ["cache", "--data", data, "--teacher", teacher, "--views", 9, "--out", out]

    return make


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_training_survives_kill_9(fork, tiny: Path, cache: Path, tmp_path: Path, kills: int) -> None:
    check(fork, training(tiny, cache), tmp_path, kills, same_files)


@pytest.mark.slow
def test_training_with_adapters_survives_kill_9(fork, tiny: Path, teacher: Path, tmp_path: Path) -> None:
    """The adapters of a term and their momentum are part of the checkpoint, and so are memory banks and phases."""

    def make(out: Path) -> list[object]:
        return ["distill", "--data", tiny, "--student", "resnet8", "--teacher", teacher, "--epochs", 16,
                "--batch-size", 25, "--kd-term", "vid", "--kd-term", "ft", "--kd-term", "crd", "--log-every", 7,
                "--checkpoint-seconds", 0.05, "--out", out]  # fmt: skip

    check(fork, make, tmp_path, 6, same_files)


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_caching_survives_kill_9(fork, teacher: Path, tmp_path: Path, kills: int) -> None:
    check(fork, caching(teacher, tmp_path), tmp_path, kills, same_files)


@pytest.mark.slow
def test_a_teacher_on_a_part_survives_kill_9(fork, tiny: Path, tmp_path: Path) -> None:
    def command(name: str) -> list[object]:
        return ["teacher", "train", "--data", tiny, "--net", "resnet20", "--epochs", 40, "--batch-size", 25,
                "--fraction", 0.5, "--checkpoint-seconds", 0.05, "--out", tmp_path / f"{name}.pt"]  # fmt: skip

    seconds = finish(fork, command("whole"))
    assert end_with_kills(fork, command("cut"), 3, seconds, random.Random(0)) > 0
    same_files(tmp_path / "whole.pt.run", tmp_path / "cut.pt.run")
    assert (tmp_path / "cut.pt.subset.npy").read_bytes() == (tmp_path / "whole.pt.subset.npy").read_bytes()


@pytest.mark.slow
def test_recording_survives_kill_9(fork, tiny: Path, tmp_path: Path) -> None:
    """Kills come within epochs, between an epoch's files and its checkpoint, and between two runs."""

    def make(out: Path) -> list[object]:
        return ["dynamics", "--data", tiny, "--net", "resnet8", "--epochs", 10, "--runs", 2, "--batch-size", 10,
                "--top-k", 2, "--record", "batch", "--checkpoint-seconds", 0.05, "--out", out]  # fmt: skip

    def same(whole: Path, cut: Path) -> None:
        same_files(whole, cut)
        assert (whole / "manifest.json").read_bytes() == (cut / "manifest.json").read_bytes()

    check(fork, make, tmp_path, 6, same)


@pytest.mark.slow
def test_converting_survives_kill_9(fork, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    rng = np.random.default_rng(0)
    n = 3000
    data = tmp_path / "d.npz"
    images, labels = rng.integers(0, 255, (n, 32, 32, 3), dtype=np.uint8), np.arange(n) % 10
    np.savez(data, train_images=images, train_labels=labels, test_images=images[:50], test_labels=labels[:50])
    from kdfast.data.readers.registry import open_source

    fingerprint = open_source(data).fingerprint

    def same(whole: Path, cut: Path) -> None:
        assert open_source(cut).fingerprint == open_source(whole).fingerprint == fingerprint
        assert sorted(f.name for f in cut.iterdir()) == sorted(f.name for f in whole.iterdir())

    check(fork, lambda out: ["data", "convert", data, out], tmp_path, 20, same)


def test_sigterm_saves_and_exits_75(fork, tiny: Path, cache: Path, tmp_path: Path) -> None:
    command = training(tiny, cache)(tmp_path / "run")
    process = fork(*command)
    status = tmp_path / "run" / "status.json"
    deadline = time.monotonic() + 60
    while not (status.exists() and json.loads(status.read_text())["step"] > 5) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill(signal.SIGTERM)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 75, err
    assert "SIGTERM" in err
    told = json.loads(status.read_text())
    assert told["state"] == "interrupted"
    latest = json.loads((tmp_path / "run" / "checkpoints" / "latest.json").read_text())
    assert latest["step"] == told["step"] > 5
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    finish(fork, command)
    assert json.loads(status.read_text())["state"] == "finished"


def test_signal_during_the_last_step_interrupts_the_command(kdfast, tiny, tmp_path, monkeypatch) -> None:
    from kdfast.distillation import train

    def command(out: Path) -> list[object]:
        return ["distill", "--data", tiny, "--student", "resnet8", "--epochs", 2, "--batch-size", 20, "--alpha", 0,
                "--out", out]  # fmt: skip

    log = train._TrainingLoop.log

    def signalled(loop, epoch_ended: bool) -> None:
        log(loop, epoch_ended)
        if loop.trainer.step == loop.trainer.total_steps:
            os.kill(os.getpid(), signal.SIGINT)

    assert kdfast(*command(tmp_path / "whole")).code == 0
    with monkeypatch.context() as patch:
        patch.setattr(train._TrainingLoop, "log", signalled)
        ran = kdfast(*command(tmp_path / "cut"))
    assert ran.code == 75
    assert "stopped by SIGINT after step 12 of 12" in ran.err
    assert not (tmp_path / "cut" / "result.json").exists()
    assert kdfast(*command(tmp_path / "cut")).code == 0
    assert state_of(tmp_path / "cut") == state_of(tmp_path / "whole")
