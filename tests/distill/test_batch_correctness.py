"""`record_dynamics` with correctness in training batches: the values, the resumed values, and the unchanged weights."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kdfast.data.loaders import ResidentLoader
from kdfast.data.readers.registry import open_source
from kdfast.data.source import ArraySplit, compute_normalization
from kdfast.data.views import apply_views
from kdfast.distillation.config import RunConfig
from kdfast.distillation.plan import LoadedInputs
from kdfast.distillation.record_dynamics import RecordingConfig, record_dynamics
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.trainer import Trainer
from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import CheckpointError, UsageError

CPU = torch.device("cpu")
N, EPOCHS = 36, 4
CONFIG = RunConfig("resnet8", epochs=EPOCHS, batch_size=8, lr=0.05)


@pytest.fixture(scope="module")
def inputs() -> LoadedInputs:
    whole = open_source("digits")
    ids = np.arange(N)
    part = ArraySplit(whole.train.read(ids), whole.train.labels[ids], "part")
    source = dataclasses.replace(whole, train=part, test=part, recorded=None)
    return LoadedInputs(source, ResidentLoader(part, "cpu"), compute_normalization(part), TeacherTargets())


def record(inputs: LoadedInputs, out: Path, seconds: float = 30, **more: Any) -> dict[str, Any]:
    recording = RecordingConfig(**{"record": "batch", **more})
    (result,) = record_dynamics(inputs, CONFIG, recording, out, device=CPU, checkpoint_seconds=seconds)
    return result


def correct_by_hand(inputs: LoadedInputs, ids: np.ndarray) -> np.ndarray:
    """Train once more; before each step, a copy of the network predicts the batch that comes next."""
    trainer = Trainer(inputs.plan(CONFIG, ids, device=CPU))
    plan, rows = trainer.plan, []
    now = np.zeros(N, np.bool_)
    for epoch in range(EPOCHS):
        for batch in trainer.batches.epoch(epoch):
            net = copy.deepcopy(trainer.net).train()
            x = apply_views(
                batch.images, batch.view_ids, plan.source.view_spec, plan.normalization, sample_ids=batch.ids,
                rows=batch.image_rows,
            )  # fmt: skip
            now[batch.ids] = (net(x).argmax(1) == trainer.labels[batch.ids]).numpy()
            trainer.train_step(batch)
        rows.append(now.copy())
    return np.array(rows)


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_records_the_predictions_before_each_step(inputs: LoadedInputs, tmp_path: Path, keep: float) -> None:
    record(inputs, tmp_path / "dyn", keep=keep)
    dynamics = Dynamics.open(tmp_path / "dyn")
    trained = np.flatnonzero(dynamics.mask(0))
    correct = dynamics.correct(0, when="batch")
    assert np.array_equal(correct, correct_by_hand(inputs, trained))
    assert not np.array_equal(correct, dynamics.correct(0))
    assert 0.01 < correct.mean() < 0.9
    assert not np.delete(correct, trained, axis=1).any()


def test_recording_batches_changes_no_weight(inputs: LoadedInputs, tmp_path: Path) -> None:
    weights = {kind: record(inputs, tmp_path / kind, record=kind)["weights"] for kind in ("epoch", "batch")}
    assert weights["epoch"] == weights["batch"]
    for name in ("p_y", "correct"):
        arrays = [(tmp_path / kind / "run-00" / f"{name}.npy").read_bytes() for kind in weights]
        assert arrays[0] == arrays[1]
    assert not (tmp_path / "epoch" / "run-00" / "correct_batch.npy").exists()


def test_every_second_epoch_has_its_own_batches(inputs: LoadedInputs, tmp_path: Path) -> None:
    record(inputs, tmp_path / "all")
    record(inputs, tmp_path / "half", record_every=2)
    whole, half = (Dynamics.open(tmp_path / name).correct(0, when="batch") for name in ("all", "half"))
    assert np.array_equal(half, whole[1::2])


class Stop(Exception):
    """The process ends."""


def test_resumes_within_an_epoch(inputs: LoadedInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five steps an epoch: the run ends at steps within epochs, just before their last, and after a recording."""
    whole = record(inputs, tmp_path / "whole")
    train_step = Trainer.train_step
    for first, last in ((0, 1), (1, 3), (3, 4), (4, 7), (7, 9)):
        steps = []

        def step(self: Trainer, batch: Any, last: int = last, steps: list[int] = steps) -> None:
            if self.step == last:
                raise Stop
            steps.append(self.step)
            train_step(self, batch)

        monkeypatch.setattr(Trainer, "train_step", step)
        with pytest.raises(Stop):
            record(inputs, tmp_path / "cut", seconds=0)
        assert steps == list(range(first, last)), "it went on at the step where it had ended"
    monkeypatch.setattr(Trainer, "train_step", train_step)
    end_epoch = DynamicsRecorder.end_epoch

    def ends(self: DynamicsRecorder) -> None:
        end_epoch(self)
        raise Stop

    monkeypatch.setattr(DynamicsRecorder, "end_epoch", ends)
    with pytest.raises(Stop):
        record(inputs, tmp_path / "cut", seconds=0)
    monkeypatch.setattr(DynamicsRecorder, "end_epoch", end_epoch)
    assert record(inputs, tmp_path / "cut", seconds=0)["weights"] == whole["weights"]
    seals = [(tmp_path / name / "manifest.json").read_bytes() for name in ("whole", "cut")]
    assert seals[0] == seals[1]


def test_a_checkpoint_without_batches_is_refused(
    inputs: LoadedInputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half an epoch of a recording without batches: its plan is replaced, but the first batches are unknown."""
    train_step = Trainer.train_step

    def step(self: Trainer, batch: Any) -> None:
        if self.step == 2:
            raise Stop
        train_step(self, batch)

    monkeypatch.setattr(Trainer, "train_step", step)
    with pytest.raises(Stop):
        record(inputs, tmp_path / "dyn", seconds=0, record="epoch")
    with pytest.raises(CheckpointError, match="no correctness in batches"):
        record(inputs, tmp_path / "dyn")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"record": "step"}, "`record` is 'step': pass one of epoch, batch"),
        ({"top_k": -1}, "`top_k` is -1"),
        ({"top_k": 11}, "`top_k` is 11 of 10 classes"),
    ],
)
def test_rejects_settings_out_of_range(inputs: LoadedInputs, tmp_path: Path, more: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        record(inputs, tmp_path / "dyn", **more)
    assert not (tmp_path / "dyn").exists()
