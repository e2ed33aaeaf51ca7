"""Training loops as they are: batches dropped or repeated, and ids, labels and values of several types."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import DataError, UsageError

N, C, K, EPOCHS = 26, 5, 2, 4
LABELS = np.arange(N) % C


def recorder(path: Path, labels=LABELS, **options) -> DynamicsRecorder:
    return DynamicsRecorder(path / "dyn", N, labels, **{"epochs": EPOCHS, **options})


def batches_of(epoch: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return batches of 8 without the last, smaller one."""
    draw = np.random.default_rng(epoch)
    order = draw.permutation(N)
    return [(order[start : start + 8], draw.normal(size=(8, C))) for start in range(0, N - 8, 8)]


def probabilities(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits)
    return raised / raised.sum()


@pytest.mark.parametrize("processes", [1, EPOCHS])
def test_a_sample_that_an_epoch_lacks_keeps_its_values(tmp_path: Path, processes: int) -> None:
    for _ in range(processes):
        with recorder(tmp_path, top_k=K, incomplete="repeat") as one:
            for epoch in range(one.epoch, one.epoch + EPOCHS // processes):
                for ids, logits in batches_of(epoch):
                    one.update(ids, logits)
                one.end_epoch()
    dynamics = Dynamics.open(tmp_path / "dyn")
    now = [None] * N
    for epoch in range(EPOCHS):
        for ids, logits in batches_of(epoch):
            for i, row in zip(ids, logits, strict=True):
                now[i] = row
        assert epoch or any(row is None for row in now)
        for i, row in enumerate(now):
            p = np.full(C, 1 / C) if row is None else probabilities(row)
            other = np.delete(p, LABELS[i]).max()
            assert dynamics.p_y(0)[epoch, i] == pytest.approx(p[LABELS[i]], rel=1e-3)
            assert dynamics.p_other(0)[epoch, i] == pytest.approx(other, rel=1e-3)
            assert dynamics.margin(0)[epoch, i] == pytest.approx(np.log(p[LABELS[i]] / other), rel=1e-3, abs=2e-3)
            error = p - (np.arange(C) == LABELS[i])
            assert dynamics.el2n(0)[epoch, i] == pytest.approx(np.sqrt((error**2).sum()), rel=1e-3)
            assert dynamics.correct(0)[epoch, i] == (row is not None and row.argmax() == LABELS[i])
            assert dynamics.top(0, epoch)[1][i] == pytest.approx(np.sort(p)[::-1][:K], rel=1e-3)
            if row is not None:
                assert dynamics.top(0, epoch)[0][i].tolist() == np.argsort(-row)[:K].tolist()


def test_a_loop_that_drops_its_last_batch_learns_of_the_option(tmp_path: Path) -> None:
    with recorder(tmp_path) as one:
        for ids, logits in batches_of(0):
            one.update(ids, logits)
        with pytest.raises(DataError, match=rf"epoch 0: {N - 24} of {N} samples .* or `incomplete` repeat to keep"):
            one.end_epoch()
        assert one.epoch == 0


def test_an_empty_epoch_is_not_repeated(tmp_path: Path) -> None:
    with recorder(tmp_path, incomplete="repeat") as one, pytest.raises(DataError, match=f"{N} of {N} samples"):
        one.end_epoch()


def test_features_are_not_repeated(tmp_path: Path) -> None:
    with recorder(tmp_path, feature_epochs=[0], incomplete="repeat") as one:
        one.update([3], torch.zeros(1, C), torch.zeros(1, 2))
        with pytest.raises(DataError, match="features of other epochs cannot stand in"):
            one.end_epoch()


def test_the_option_is_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="`incomplete` is 'drop': pass one of error, repeat"):
        recorder(tmp_path, incomplete="drop")
    assert not (tmp_path / "dyn").exists()


@pytest.mark.parametrize("together", [True, False])
def test_the_last_values_of_a_sample_count(tmp_path: Path, together: bool) -> None:
    """Samplers of distributed loops give some samples twice, in one batch or in two."""
    first, second = np.zeros((N, C)), np.eye(C)[(LABELS + 1) % C] * 9
    with recorder(tmp_path, epochs=1) as one:
        if together:
            one.update(np.r_[np.arange(N), np.arange(N)], np.r_[first, second])
        else:
            one.update(np.arange(N), first)
            one.update(np.arange(N), second)
        one.end_epoch()
    assert (Dynamics.open(tmp_path / "dyn").margin(0) == -9).all()


KINDS = {
    "list": list,
    "list of ints": lambda x: x.tolist(),
    "tuple": tuple,
    "tensor": torch.from_numpy,
    "int32 tensor": lambda x: torch.from_numpy(x).int(),
    "list of tensors": lambda x: list(torch.from_numpy(x)),
    "uint8": lambda x: x.astype(np.uint8),
    "big-endian": lambda x: x.astype(">i8"),
    "strided": lambda x: np.repeat(x, 2)[::2],
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_and_ids_may_be_of_any_integer_type(tmp_path: Path, kind: str) -> None:
    convert = KINDS[kind]
    with recorder(tmp_path, convert(LABELS), epochs=1) as one:
        one.update(convert(np.arange(N)), np.eye(C)[LABELS])
        one.end_epoch()
    dynamics = Dynamics.open(tmp_path / "dyn", labels=convert(LABELS))
    assert dynamics.correct(0).all()
    assert dynamics.labels.dtype == np.int64


@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy, lambda x: x.tolist()])
def test_logits_and_features_may_be_float64(tmp_path: Path, kind) -> None:
    draw = np.random.default_rng(0)
    logits, features = draw.normal(size=(N, C)), draw.normal(size=(N, 3))
    with recorder(tmp_path, epochs=1, feature_epochs=[0]) as one:
        one.update(np.arange(N), kind(logits), kind(features))
        one.end_epoch()
    dynamics = Dynamics.open(tmp_path / "dyn")
    assert np.allclose(dynamics.features(0, 0), features, rtol=1e-6)
    assert dynamics.features(0, 0).dtype == np.float32
    expected = [probabilities(row)[y] for row, y in zip(logits, LABELS, strict=True)]
    assert np.allclose(dynamics.p_y(0)[0], expected, rtol=1e-3)
