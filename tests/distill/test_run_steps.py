"""A run of a given number of steps: it ends in the middle of an epoch, and is otherwise like a run of whole epochs."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.loaders import ResidentLoader
from kdfast.data.source import Source, compute_normalization
from kdfast.distillation.config import RunConfig
from kdfast.distillation.folder import RunFolder
from kdfast.distillation.losses.settings import parse_terms
from kdfast.distillation.plan import LoadedInputs, Plan
from kdfast.distillation.record_dynamics import RecordingConfig, check_recording
from kdfast.distillation.targets import TeacherTargets
from kdfast.distillation.train import Monitoring, train
from kdfast.distillation.trainer import Trainer
from kdfast.errors import UsageError

PER_EPOCH = 4  # batches of 32, 32, 32 and 5


@pytest.fixture
def planned(source: Source):
    """Return a function that plans a run on 101 samples."""
    inputs = LoadedInputs(
        source, ResidentLoader(source.train, "cpu"), compute_normalization(source.train), TeacherTargets()
    )
    ids = np.arange(0, 303, 3, dtype=np.int64)

    def plan(**settings) -> Plan:
        return inputs.plan(RunConfig("resnet8", batch_size=32, lr=0.1, **settings), ids, device=torch.device("cpu"))

    return plan


def run(plan: Plan, path: Path, monitoring: Monitoring | None = None) -> dict:
    with RunFolder(path, plan.identity, metadata=plan.metadata) as folder:
        return train(plan, folder, monitoring)


@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_the_last_epoch_ends_early(planned, tmp_path: Path, steps: int) -> None:
    plan = planned(steps=steps, schedule="constant")
    assert plan.config.epochs == -(-steps // PER_EPOCH)
    assert plan.describe()["steps"] == steps
    result = run(plan, tmp_path / "run")
    # The same steps of a run that goes on.
    longer = Trainer(planned(epochs=2, schedule="constant"))
    images = 0
    while longer.step < steps:
        for batch in longer.batches.epoch(longer.epoch):
            longer.train_step(batch)
            images += len(batch.ids)
            if longer.step == steps:
                break
    assert result["weights"] == longer.model().digest
    assert (result["steps"], result["images"]) == (steps, images)
    assert plan.describe()["images"] == images
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [*range(PER_EPOCH, steps, PER_EPOCH), steps]


def test_the_schedule_spans_the_steps(planned, tmp_path: Path) -> None:
    plan = planned(steps=6, schedule="cosine")
    run(plan, tmp_path / "run", Monitoring(log_every=1))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    expected = 0.05 * (1 + np.cos(np.pi * np.arange(6) / 6))
    np.testing.assert_allclose([row["lr"] for row in rows], expected, rtol=1e-6)


def test_steps_of_whole_epochs_are_the_run_of_these_epochs(planned) -> None:
    assert planned(steps=8).identity == planned(epochs=2).identity
    assert planned(steps=7).identity != planned(epochs=2).identity
    assert "steps" not in planned(steps=8).identity


def test_an_interrupted_run_resumes_within_the_last_epoch(planned, tmp_path: Path) -> None:
    plan = planned(steps=7, schedule="cosine")
    whole = run(plan, tmp_path / "whole")

    def stop_at_six(step: int, steps: int, note: str) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(plan, tmp_path / "run", Monitoring(log_every=1, checkpoint_seconds=0, progress=stop_at_six))
    said: list[str] = []
    resumed = run(plan, tmp_path / "run", Monitoring(say=said.append))
    assert said == ["resuming at step 5 of 7"]
    assert resumed["weights"] == whole["weights"]


def test_epoch_ends_are_those_of_whole_epochs(planned, tmp_path: Path) -> None:
    ends: list[int] = []
    run(planned(steps=7), tmp_path / "run", Monitoring(on_epoch_end=lambda trainer: ends.append(trainer.step)))
    assert ends == [4]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warmup_epochs": 2}, "`warmup_epochs` is 2 of 1.75 epochs"),
        ({"alpha": 1.0, "terms": parse_terms(["dist"], []), "terms_warmup_epochs": 2}, "`terms_warmup_epochs` is 2 of"),
        ({"alpha": 1.0, "terms": parse_terms(["ab"], []), "initial_epochs": 2}, "`initial_epochs` is 2 of 1.75 epochs"),
    ],
)
def test_phases_must_fit_into_the_steps(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RunConfig("resnet8", steps=7, **settings).resolve_steps(PER_EPOCH)
    # Only the length of the run counts, not the default of the epochs.
    longer = {name: 300 if name.endswith("epochs") else value for name, value in settings.items()}
    assert RunConfig("resnet8", steps=1201, **longer).resolve_steps(PER_EPOCH).epochs == 301


@pytest.mark.parametrize(("steps", "phase"), [(7, 0), (8, 1), (11, 1), (41, 1), (63, 2), (64, 2)])
def test_an_initial_phase_leaves_whole_epochs_to_the_student(steps: int, phase: int) -> None:
    config = RunConfig("resnet8", steps=steps, alpha=1.0, terms=parse_terms(["ab"], []))
    assert config.resolve_steps(PER_EPOCH).initial_phase == phase


def test_steps_are_positive() -> None:
    with pytest.raises(UsageError, match="`steps` is 0"):
        RunConfig("resnet8", steps=0)


def test_recordings_have_whole_epochs(source: Source) -> None:
    with pytest.raises(UsageError, match="`steps` is 7, and a recording has whole epochs"):
        check_recording(RunConfig("resnet8", steps=7), RecordingConfig(), source)
