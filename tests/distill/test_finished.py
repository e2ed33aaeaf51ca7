"""What a run folder holds is verified before it is used: the finished run and its student, and every saved state."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kdfast.distillation.config import RunConfig
from kdfast.distillation.folder import MetricsFile, RunFolder
from kdfast.distillation.inputs import InputPaths, plan_run
from kdfast.distillation.plan import Plan
from kdfast.distillation.train import Monitoring, train
from kdfast.errors import CheckpointError, DataError
from kdfast.files import seal, sha256_file, without_seal, write_json
from kdfast.nets.checkpoint import load_model, save_model


@pytest.fixture(scope="module")
def plan() -> Plan:
    return plan_run(InputPaths("digits"), RunConfig("resnet8", epochs=1, batch_size=512), device=torch.device("cpu"))


@pytest.fixture(scope="module")
def finished(plan: Plan, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "run"
    with RunFolder(path, plan.identity) as folder:
        train(plan, folder, Monitoring(keep_checkpoints=True))
    return path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def again(plan: Plan, path: Path) -> dict:
    with RunFolder(path, plan.identity) as folder:
        return train(plan, folder)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_weights(path: Path) -> None:
    model = load_model(path)
    with torch.no_grad():
        next(model.net.parameters()).mul_(2)
    save_model(path, model)


def other_metadata(path: Path) -> None:
    model = load_model(path)
    model.metadata["test_top1"] = 99.0
    save_model(path, model)


def other_normalization(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "mean": [0.1, 0.2, 0.3]}, path)


@pytest.mark.parametrize("change", [empty, other_weights, other_metadata, other_normalization])
def test_a_finished_run_with_another_student_is_refused(plan: Plan, run: Path, change: Callable[[Path], None]) -> None:
    before = again(plan, run)
    change(run / "student.pt")
    with pytest.raises(CheckpointError, match=r"student\.pt .*delete .*student\.pt and run the same command again"):
        again(plan, run)
    # The advice works.
    (run / "student.pt").unlink()
    assert again(plan, run)["weights"] == before["weights"] == load_model(run / "student.pt").digest


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("test_top1", "50"),
        ("test_top1", 101.0),
        ("steps", -1),
        ("weights", 7),
        ("seconds", None),
        ("kept", True),
        ("targets", []),
    ],
)
def test_a_changed_result_is_refused(plan: Plan, run: Path, field: str, value: object) -> None:
    content = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**content, field: value}))
    with pytest.raises(DataError, match=rf"result\.json.*field {field}"):
        again(plan, run)


@pytest.mark.parametrize(
    ("field", "value"), [("weights", "f" * 64), ("test_top1", 99.0), ("test_top5", 50), ("steps", 8), ("targets", "x")]
)
def test_a_result_that_was_edited_is_refused(plan: Plan, run: Path, field: str, value: object) -> None:
    file, before = run / "result.json", again(plan, run)
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    with pytest.raises(DataError, match=r"result\.json was damaged or edited.*delete it and run the same command"):
        again(plan, run)
    file.unlink()  # the advice works
    assert again(plan, run)["weights"] == before["weights"]


def test_results_of_earlier_versions_have_no_digest(plan: Plan, run: Path) -> None:
    before = again(plan, run)
    (run / "result.json").write_text(json.dumps(before))
    assert again(plan, run) == before


@pytest.mark.parametrize("text", ["", "[", "[]", "[" * 100_000, '{"test_top1": 1e999}', "\ufeff{}"])
def test_a_result_that_is_no_json_object_is_refused(plan: Plan, run: Path, text: str) -> None:
    (run / "result.json").write_text(text)
    with pytest.raises(DataError, match=r"result\.json"):
        again(plan, run)


class WritesFile:
    """A pickle that creates a file if an unsafe loader reads it."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def stop(run: Path) -> Path:
    """Make the run unfinished, and return its last checkpoint."""
    (run / "result.json").unlink()
    (file,) = (run / "checkpoints").glob("step-*.pt")
    return file


def point(run: Path, **fields: object) -> None:
    pointer = run / "checkpoints" / "latest.json"
    pointer.write_text(json.dumps({**json.loads(pointer.read_text()), **fields}))


def test_a_malicious_checkpoint_with_a_matching_digest_is_refused(plan: Plan, run: Path, tmp_path: Path) -> None:
    file = stop(run)
    torch.save({"step": WritesFile(str(tmp_path / "ran"))}, file)
    point(run, sha256=sha256_file(file))
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(file))} was rejected and nothing in it was run"):
        again(plan, run)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "3"}, "field step"),
        ({"step": -1}, "field step"),
        ({"train_seconds": float("inf")}, "field train_seconds"),
        ({"net": {}}, "does not fit this run"),
        ({"net": [1]}, "field net"),
        ({"optimizer": {"state": 3}}, "does not fit this run"),
        ({"rng": torch.zeros(3)}, "does not fit this run"),
        ({"loss_sum": "x"}, "does not fit this run"),
        ({"step": 10**12}, r"is of step 1000000000000, .* this run has \d+ steps"),
        ({"loss_steps": 10**12}, "with a loss over 1000000000000"),
    ],
)
def test_a_checkpoint_with_other_content_is_refused(plan: Plan, run: Path, change: dict, message: str) -> None:
    file = stop(run)
    torch.save({**torch.load(file, weights_only=True), **change}, file)
    point(run, sha256=sha256_file(file))
    with pytest.raises(CheckpointError, match=message):
        again(plan, run)


@pytest.mark.parametrize("fields", [{"file": "../x.pt"}, {"file": 7}, {"sha256": None}, {"before": [1]}, {"step": 1.5}])
def test_names_the_field_of_a_damaged_pointer(plan: Plan, run: Path, fields: dict) -> None:
    stop(run)
    point(run, **fields)
    with pytest.raises(CheckpointError, match=rf"latest\.json: field {next(iter(fields))}.*: delete .* and run again"):
        again(plan, run)


@pytest.mark.parametrize("line", ['{"step": "3"}', '{"step": 3, "lr": NaN}', '{"step": ' + "[" * 5000, "{}"])
def test_names_the_field_of_damaged_metrics(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=r"metrics\.jsonl is not a metrics row"):
        MetricsFile(tmp_path / "metrics.jsonl")


def test_names_the_field_of_a_damaged_config(plan: Plan, run: Path) -> None:
    content = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**content, "started_with": 5}))
    with pytest.raises(DataError, match=r"config\.json: field started_with: expected object, got int"):
        again(plan, run)


def test_a_weight_of_the_teacher_above_1_is_a_result(plan: Plan, run: Path) -> None:
    """It is allowed beside a weight of the cross-entropy, as in RepDistiller's loss."""
    result = without_seal(json.loads((run / "result.json").read_text()))
    write_json(run / "result.json", seal({**result, "alpha": 2.0}))
    assert again(plan, run)["alpha"] == 2.0
    write_json(run / "result.json", seal({**result, "alpha": -1.0}))
    with pytest.raises(DataError, match="alpha"):
        again(plan, run)
