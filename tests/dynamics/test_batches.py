"""Correctness in training batches, against a loop over samples in plain Python."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.dynamics.batches import BatchCorrectness
from kdfast.dynamics.values import place_ids
from kdfast.errors import DataError, ShapeError, UsageError

spec = importlib.util.spec_from_file_location("stand_in_device", Path(__file__).parents[1] / "stand_in_device.py")
assert spec is not None
assert spec.loader is not None
stand_in = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stand_in)

N, C, EPOCHS = 23, 3, 4
LABELS = np.arange(N) % C
CPU = torch.device("cpu")


def recorder(path: Path, **options) -> DynamicsRecorder:
    return DynamicsRecorder(path / "dyn", N, LABELS, **{"epochs": EPOCHS, "record": "batch", **options})


def batches_of(epoch: int, drop_last: bool = False) -> list[tuple[np.ndarray, torch.Tensor]]:
    draw = np.random.default_rng(epoch)
    order = draw.permutation(N)
    parts = [order[start : start + 5] for start in range(0, N, 5)]
    return [(ids, torch.from_numpy(draw.normal(size=(len(ids), C)))) for ids in (parts[:-1] if drop_last else parts)]


def end_epoch(recorder: DynamicsRecorder) -> None:
    """Give the outputs after an epoch, which are wrong for every sample."""
    recorder.update(np.arange(N), -torch.eye(C)[LABELS])
    recorder.end_epoch()


def record(path: Path, drop_last: bool = False) -> None:
    with recorder(path) as one:
        for epoch in range(one.epoch, EPOCHS):
            for ids, logits in batches_of(epoch, drop_last):
                one.update_batch(ids, logits)
            end_epoch(one)


def expected(drop_last: bool = False) -> np.ndarray:
    """Return correctness per epoch; a sample that is in no batch keeps its value, at first wrong."""
    rows, now = [], [False] * N
    for epoch in range(EPOCHS):
        for ids, logits in batches_of(epoch, drop_last):
            for i, row in zip(ids.tolist(), logits.tolist(), strict=True):
                now[i] = row.index(max(row)) == LABELS[i]
        rows.append(list(now))
    return np.array(rows)


@pytest.mark.parametrize("drop_last", [False, True])
def test_records_each_sample_in_its_batch(tmp_path: Path, drop_last: bool) -> None:
    record(tmp_path, drop_last)
    dynamics = Dynamics.open(tmp_path / "dyn")
    assert np.array_equal(dynamics.correct(0, when="batch"), expected(drop_last))
    assert 0.1 < dynamics.correct(0, when="batch").mean() < 0.9
    assert not dynamics.correct(0).any()
    assert dynamics.record == "batch"


def test_the_last_of_several_rows_of_a_sample_counts() -> None:
    """Also within a batch, and the same in every order of writes."""
    draw = np.random.default_rng(0)
    watch, now = BatchCorrectness(LABELS, CPU), [False] * N
    for _ in range(30):
        ids = draw.integers(0, N, 40)
        logits = draw.normal(size=(40, C))
        watch.add(torch.from_numpy(ids), torch.from_numpy(logits))
        for i, row in zip(ids.tolist(), logits, strict=True):
            now[i] = row.argmax() == LABELS[i]
        assert watch.read()[0].tolist() == now


@pytest.mark.parametrize("kind", [list, np.asarray, torch.tensor, lambda ids: torch.tensor(ids, dtype=torch.int32)])
def test_ids_may_be_lists_arrays_and_tensors(tmp_path: Path, kind) -> None:
    with recorder(tmp_path, epochs=1) as one:
        for ids in ([0, 3, 6], [1, 2]):
            one.update_batch(kind(ids), torch.eye(C)[LABELS[ids]])
        end_epoch(one)
    assert np.flatnonzero(Dynamics.open(tmp_path / "dyn").correct(0, when="batch")).tolist() == [0, 1, 2, 3, 6]


@pytest.mark.usefixtures("no_poison")
@pytest.mark.parametrize("ids_on_device", [False, True])
def test_a_device_is_waited_for_at_the_end_of_an_epoch_only(tmp_path: Path, ids_on_device: bool) -> None:
    with recorder(tmp_path) as one, stand_in.StandInDevice() as device:
        for epoch in range(EPOCHS):
            for ids, logits in batches_of(epoch):
                place = (lambda x: x.to(stand_in.DEVICE)) if ids_on_device else (lambda x: x)
                one.update_batch(place(torch.from_numpy(ids)), logits.to(stand_in.DEVICE))
            assert len(device.reads) == 3 * epoch
            end_epoch(one)
            assert len(device.reads) == 3 * (epoch + 1), "faults, correct and seen"
    assert np.array_equal(Dynamics.open(tmp_path / "dyn").correct(0, when="batch"), expected())


def test_ids_on_a_device_are_whole_numbers() -> None:
    with stand_in.StandInDevice():
        ids = torch.zeros(4, dtype=torch.int32).to(stand_in.DEVICE)
        assert place_ids(ids, N, stand_in.DEVICE).dtype == torch.int64
        with pytest.raises(ShapeError, match=r"torch\.float32 \(4,\): pass integers"):
            place_ids(torch.zeros(4).to(stand_in.DEVICE), N, stand_in.DEVICE)


def test_epochs_resume_and_rewind(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    record(tmp_path / "whole")
    for until in (1, 2, 2, EPOCHS):
        with recorder(tmp_path) as one:
            if until == 2:
                one.rewind(1)
            for epoch in range(one.epoch, until):
                for ids, logits in batches_of(epoch):
                    one.update_batch(ids, logits)
                end_epoch(one)
    whole, cut = (path / "dyn" / "manifest.json" for path in (tmp_path / "whole", tmp_path))
    assert cut.read_bytes() == whole.read_bytes()


def test_an_epoch_without_batches_is_refused(tmp_path: Path) -> None:
    with recorder(tmp_path) as one:
        with pytest.raises(DataError, match=r"no training batch was given in epoch 0: .*update_batch"):
            end_epoch(one)
        one.update_batch([1], torch.zeros(1, C))
        one.end_epoch()
        assert one.epoch == 1


@pytest.mark.parametrize(
    ("ids", "logits", "error", "message"),
    [
        ([N], torch.zeros(1, C), DataError, "23"),
        ([0, 1], torch.zeros(1, C), ShapeError, "2 samples"),
        ([0], torch.zeros(1, C, device="meta"), ShapeError, "meta device"),
        (torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1, C), DataError, "sample ids are not an array"),
        ([0], torch.zeros(1, C - 1), ShapeError, "3 classes"),
        ([0.5], torch.zeros(1, C), ShapeError, "integers"),
        (torch.ones(1), torch.zeros(1, C), ShapeError, "integers"),
    ],
)
def test_rejects_bad_batches(tmp_path: Path, ids, logits, error, message: str) -> None:
    with recorder(tmp_path) as one, pytest.raises(error, match=message):
        one.update_batch(ids, logits)


@pytest.mark.parametrize(
    ("ids", "logits", "message"),
    [([0], torch.full((1, C), torch.nan), "not finite"), ([-1], torch.zeros(1, C), "0 to 22")],
)
def test_faults_on_the_device_are_reported_at_the_end_of_the_epoch(ids, logits, message: str) -> None:
    watch = BatchCorrectness(LABELS, CPU)
    watch.add(torch.tensor(ids), logits)
    with pytest.raises(DataError, match=message):
        watch.read()


def test_batches_need_a_recording_of_batches(tmp_path: Path) -> None:
    with recorder(tmp_path, record="epoch") as one:
        with pytest.raises(UsageError, match=r"`record` is epoch: pass batch"):
            one.update_batch([0], torch.zeros(1, C))
        for _ in range(EPOCHS):
            end_epoch(one)
    with pytest.raises(UsageError, match=r"without correctness in training batches: record again .*record=batch"):
        Dynamics.open(tmp_path / "dyn").correct(0, when="batch")
    with pytest.raises(UsageError, match=r"`record` is 'step': pass one of epoch, batch"):
        recorder(tmp_path, record="step")


def test_a_changed_byte_is_detected(tmp_path: Path) -> None:
    record(tmp_path)
    file = tmp_path / "dyn" / "run-00" / "correct_batch.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"correct_batch\.npy is damaged"):
        Dynamics.open(tmp_path / "dyn")
