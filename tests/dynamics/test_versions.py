"""Folders of earlier versions are read and continued. The files are written here by hand, as version 1 wrote them."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import UsageError
from kdfast.files import read_sealed, write_sealed

N, C, EPOCHS = 11, 3, 2
LABELS = np.arange(N) % C
PLAN = {
    "format": "kdfast-dynamics",
    "version": 1,
    "samples": N,
    "epochs": EPOCHS,
    "labels": hashlib.sha256(LABELS.astype("<i8").tobytes()).hexdigest(),
    "fingerprint": None,
    "feature_epochs": [],
    "facts": {"lr": 0.1},
}


def epoch_of(epoch: int) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(epoch)
    values = {name: draw.random(N).astype(np.float16) for name in ("p_y", "margin", "el2n")}
    return {**values, "correct": np.packbits(draw.random(N) < 0.5)}


def write_begun(path: Path, epochs: int) -> None:
    run = path / "run-00"
    run.mkdir(parents=True)
    write_sealed(path / "plan.json", PLAN)
    np.save(path / "labels.npy", LABELS)
    np.save(run / "mask.npy", np.packbits(np.ones(N, np.bool_)))
    for epoch in range(epochs):
        np.savez(run / f"epoch-{epoch:04d}.npz", **epoch_of(epoch))


def write_finished(path: Path) -> None:
    write_begun(path, 0)
    run = path / "run-00"
    for name in epoch_of(0):
        np.save(run / f"{name}.npy", np.stack([epoch_of(epoch)[name] for epoch in range(EPOCHS)]))
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        for file in run.glob("*.npy")
    }
    write_sealed(run / "sealed.json", {"files": files})
    write_sealed(path / "manifest.json", {**PLAN, "runs": [files]})


def test_reads_version_1(tmp_path: Path) -> None:
    write_finished(tmp_path / "dyn")
    dynamics = Dynamics.open(tmp_path / "dyn", labels=LABELS)
    assert np.array_equal(dynamics.margin(0)[1], epoch_of(1)["margin"])
    assert np.array_equal(np.packbits(dynamics.correct(0)[0]), epoch_of(0)["correct"])
    with pytest.raises(UsageError, match=r"earlier version of kdfast, without p_other: record again with kdfast dyn"):
        dynamics.p_other(0)


def test_continues_an_unfinished_run_of_version_1(tmp_path: Path) -> None:
    write_begun(tmp_path / "dyn", 1)
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=EPOCHS, facts=PLAN["facts"]) as recorder:
        assert recorder.epoch == 1
        recorder.update(np.arange(N), torch.zeros(N, C))
        recorder.end_epoch()
    dynamics = Dynamics.open(tmp_path / "dyn")
    assert np.array_equal(dynamics.p_y(0)[0], epoch_of(0)["p_y"])
    assert np.allclose(dynamics.p_y(0)[1], 1 / 3, rtol=1e-3)
    assert read_sealed(tmp_path / "dyn" / "manifest.json")["version"] == 1


def test_a_second_run_of_version_1_is_added(tmp_path: Path) -> None:
    write_finished(tmp_path / "dyn")
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=EPOCHS, run=1, runs=2, facts=PLAN["facts"]) as recorder:
        for _ in range(EPOCHS):
            recorder.update(np.arange(N), torch.zeros(N, C))
            recorder.end_epoch()
    dynamics = Dynamics.open(tmp_path / "dyn")
    assert (dynamics.runs, dynamics.p_y(1).shape) == (2, (EPOCHS, N))


def test_a_plan_of_version_1_without_an_epoch_is_replaced(tmp_path: Path) -> None:
    write_begun(tmp_path / "dyn", 0)
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=EPOCHS, facts=PLAN["facts"]) as recorder:
        for _ in range(EPOCHS):
            recorder.update(np.arange(N), torch.zeros(N, C))
            recorder.end_epoch()
    assert np.allclose(Dynamics.open(tmp_path / "dyn").p_other(0), 1 / 3, rtol=1e-3)


def test_other_settings_of_version_1_are_refused(tmp_path: Path) -> None:
    write_begun(tmp_path / "dyn", 1)
    with pytest.raises(UsageError, match=r"`lr` was 0.1, is 0.2"):
        DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=EPOCHS, facts={"lr": 0.2})
