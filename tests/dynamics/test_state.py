"""What is on disk is verified before it is used, and what cannot be stored or resumed is refused at once."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import DataError, ShapeError, UsageError
from kdfast.files import read_sealed, write_sealed

N, CLASSES = 20, 3
LABELS = np.arange(N) % CLASSES


def recorder(path: Path, **options) -> DynamicsRecorder:
    return DynamicsRecorder(path / "dyn", N, LABELS, **{"epochs": 2, **options})


def update(recorder: DynamicsRecorder) -> None:
    draw = torch.Generator().manual_seed(recorder.epoch)
    logits, features = torch.randn(N, CLASSES, generator=draw), torch.randn(N, 4, generator=draw)
    recorder.update(np.arange(N), logits, features if recorder.wants_features else None)


def record(path: Path, count: int, **options) -> None:
    with recorder(path, **options) as one:
        for _ in range(count):
            update(one)
            one.end_epoch()


def flip(file: Path, position: int = -3) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["labels.npy", "run-00/mask.npy", "run-00/epoch-0000.npz", "run-00/features-0000.npy"])
def test_a_flipped_bit_in_an_unfinished_recording_is_refused(tmp_path: Path, name: str) -> None:
    record(tmp_path, 1, feature_epochs=[0])
    file = tmp_path / "dyn" / name
    flip(file, -200 if name.endswith("npz") else -3)
    error = UsageError if "mask" in name else DataError
    with pytest.raises(error, match=r"mask" if "mask" in name else re.escape(name)):
        recorder(tmp_path, feature_epochs=[0])


FINISHED = ["el2n.npy", "correct.npy", "mask.npy", "features-0000.npy", "sealed.json"]


@pytest.mark.parametrize("name", FINISHED)
def test_a_flipped_bit_in_a_finished_run_is_refused_and_the_advice_works(tmp_path: Path, name: str) -> None:
    record(tmp_path, 2, feature_epochs=[0])
    before = {file.name: file.read_bytes() for file in (tmp_path / "dyn" / "run-00").iterdir()}
    flip(tmp_path / "dyn" / "run-00" / name)
    with pytest.raises(DataError, match=rf"{re.escape(name)} is damaged: delete (\S*run-00) "):
        recorder(tmp_path, feature_epochs=[0])
    shutil.rmtree(tmp_path / "dyn" / "run-00")
    record(tmp_path, 2, feature_epochs=[0])
    assert {file.name: file.read_bytes() for file in (tmp_path / "dyn" / "run-00").iterdir()} == before
    Dynamics.open(tmp_path / "dyn")


def test_a_damaged_manifest_is_written_anew(tmp_path: Path) -> None:
    record(tmp_path, 2)
    file = tmp_path / "dyn" / "manifest.json"
    before = file.read_bytes()
    flip(file, len(before) // 2)
    with pytest.raises(DataError, match=r"manifest\.json is damaged: run kdfast dynamics again"):
        Dynamics.open(tmp_path / "dyn")
    recorder(tmp_path).close()
    assert file.read_bytes() == before


def test_a_finished_run_of_another_mask_is_refused(tmp_path: Path) -> None:
    record(tmp_path, 2)
    with pytest.raises(UsageError, match="another mask"):
        recorder(tmp_path, mask=np.arange(N) > 3)


def test_damaged_labels_can_be_deleted_and_nothing_is_lost(tmp_path: Path) -> None:
    record(tmp_path, 1)
    flip(tmp_path / "dyn" / "labels.npy")
    with pytest.raises(DataError, match=r"labels\.npy .*delete it and start again"):
        recorder(tmp_path)
    (tmp_path / "dyn" / "labels.npy").unlink()
    record(tmp_path, 1)
    assert np.array_equal(Dynamics.open(tmp_path / "dyn").labels, LABELS)


def test_epochs_of_recorders_without_digests_of_features_resume(tmp_path: Path) -> None:
    record(tmp_path, 1, feature_epochs=[0])
    file = tmp_path / "dyn" / "run-00" / "epoch-0000.npz"
    held = dict(np.load(file))
    del held["features_sha256"]
    np.savez(file, **held)
    record(tmp_path, 1, feature_epochs=[0])
    assert Dynamics.open(tmp_path / "dyn").features(0, 0).shape == (N, 4)


@pytest.mark.parametrize(
    ("file", "field", "value"),
    [
        ("manifest.json", "samples", -1),
        ("manifest.json", "runs", []),
        ("manifest.json", "feature_epochs", ["0"]),
        ("manifest.json", "facts", None),
        ("plan.json", "epochs", 2.5),
        ("plan.json", "labels", "x"),
        ("run-00/sealed.json", "files", {"mask.npy": {"bytes": "1", "sha256": "0" * 64}}),
    ],
)
def test_names_the_field_of_a_sealed_file(tmp_path: Path, file: str, field: str, value: object) -> None:
    record(tmp_path, 2)
    path = tmp_path / "dyn" / file
    write_sealed(path, {**read_sealed(path), field: value})
    with pytest.raises(DataError, match=rf"{re.escape(file)}: field {field}"):
        Dynamics.open(tmp_path / "dyn") if file == "manifest.json" else recorder(tmp_path)


@pytest.mark.parametrize("facts", [{"lr": (0.1, 0.2)}, {"a": {"b": [(1, 2)]}}, {1: "one"}])
def test_facts_compare_as_they_are_read_back(tmp_path: Path, facts: dict) -> None:
    record(tmp_path, 1, facts=facts)
    record(tmp_path, 1, facts=facts)
    assert Dynamics.open(tmp_path / "dyn").facts


@pytest.mark.parametrize("facts", [{"x": float("nan")}, {"x": {1, 2}}, {"x": torch.ones(1)}, {(1, 2): 3}])
def test_facts_that_are_no_json_values_are_refused(tmp_path: Path, facts: dict) -> None:
    with pytest.raises(UsageError, match="`facts` are not JSON values"):
        recorder(tmp_path, facts=facts)
    assert not (tmp_path / "dyn").exists()


@pytest.mark.parametrize(
    "options",
    [{"epochs": 1.5}, {"epochs": True}, {"epochs": "2"}, {"run": 0.0}, {"runs": 1.5}, {"feature_epochs": [0.5]}],
)
def test_counts_are_whole_numbers(tmp_path: Path, options: dict) -> None:
    with pytest.raises(UsageError, match=f"`{next(iter(options))}` is .*whole number"):
        recorder(tmp_path, **options)
    assert not (tmp_path / "dyn").exists()


def test_counts_may_be_numpy_integers(tmp_path: Path) -> None:
    record(tmp_path, 2, epochs=np.int64(2), feature_epochs=np.arange(2))
    assert Dynamics.open(tmp_path / "dyn").feature_epochs == [0, 1]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool])
@pytest.mark.parametrize("what", ["logits", "features"])
def test_values_are_real_numbers(tmp_path: Path, what: str, dtype: torch.dtype) -> None:
    values = {"logits": torch.ones(N, CLASSES), "features": torch.ones(N, 4)}
    values[what] = values[what].to(dtype)
    with recorder(tmp_path, feature_epochs=[0]) as one, pytest.raises(ShapeError, match=f"{what} are {str(dtype)[6:]}"):
        one.update(np.arange(N), **values)


@pytest.mark.parametrize("call", [update, lambda r: r.end_epoch(), lambda r: r.rewind(0)])
def test_a_closed_recorder_records_nothing(tmp_path: Path, call) -> None:
    one = recorder(tmp_path)
    update(one)
    one.close()
    with pytest.raises(UsageError, match="is closed"):
        call(one)
    with recorder(tmp_path) as another:
        assert another.epoch == 0
