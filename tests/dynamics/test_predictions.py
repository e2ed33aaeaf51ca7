"""The most probable classes of every prediction, against a sort in float64."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import DataError, ShapeError, UsageError

N, C, K, EPOCHS = 31, 7, 3, 3
LABELS = np.arange(N) % C


def logits_of(epoch: int, classes: int = C) -> np.ndarray:
    return np.random.default_rng(epoch).normal(0, 3, (N, classes))


def recorder(path: Path, **options) -> DynamicsRecorder:
    return DynamicsRecorder(path / "dyn", N, LABELS, **{"epochs": EPOCHS, "top_k": K, **options})


def record(path: Path, count: int = EPOCHS, **options) -> None:
    with recorder(path, **options) as one:
        for epoch in range(one.epoch, one.epoch + count):
            order = np.random.default_rng(epoch + 100).permutation(N)
            for ids in np.array_split(order, 4):
                one.update(ids, torch.from_numpy(logits_of(epoch, options.get("classes", C))[ids]))
            one.end_epoch()


def probabilities(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits)
    return raised / raised.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("k", [1, K, C])
def test_keeps_the_most_probable_classes(tmp_path: Path, k: int) -> None:
    record(tmp_path, top_k=k)
    dynamics = Dynamics.open(tmp_path / "dyn")
    assert (dynamics.top_k, dynamics.classes) == (k, C)
    for epoch in range(EPOCHS):
        ids, p = dynamics.top(0, epoch)
        whole = probabilities(logits_of(epoch))
        wanted = np.argsort(-whole, axis=1)[:, :k]
        assert np.array_equal(ids, wanted)
        assert np.allclose(p, np.take_along_axis(whole, wanted, axis=1), rtol=1e-3, atol=1e-7)
        for array, kind in ((ids, np.uint8), (p, np.float16)):
            assert isinstance(array, np.memmap)
            assert (array.dtype, array.shape) == (kind, (N, k))


@pytest.mark.parametrize(("classes", "kind"), [(256, np.uint8), (257, np.uint16)])
def test_ids_have_the_smallest_type(tmp_path: Path, classes: int, kind: type) -> None:
    record(tmp_path, classes=classes)
    assert Dynamics.open(tmp_path / "dyn").top(0, 1)[0].dtype == kind


def test_the_largest_probability_is_that_of_the_metrics(tmp_path: Path) -> None:
    record(tmp_path)
    dynamics = Dynamics.open(tmp_path / "dyn")
    largest = np.maximum(dynamics.p_y(0), dynamics.p_other(0))
    assert all(np.array_equal(dynamics.top(0, epoch)[1][:, 0], largest[epoch]) for epoch in range(EPOCHS))


def test_without_predictions_the_files_and_the_reader_have_none(tmp_path: Path) -> None:
    record(tmp_path, top_k=0)
    assert not list(tmp_path.rglob("top-*"))
    dynamics = Dynamics.open(tmp_path / "dyn")
    assert dynamics.top_k == 0
    for read in (lambda: dynamics.top(0, 0), lambda: dynamics.classes):
        with pytest.raises(UsageError, match=r"without predictions: record again with kdfast dynamics.*top_k=5"):
            read()


def test_an_epoch_that_was_not_recorded_is_refused(tmp_path: Path) -> None:
    record(tmp_path)
    with pytest.raises(UsageError, match="epochs 0 to 2, not 3"):
        Dynamics.open(tmp_path / "dyn").top(0, EPOCHS)


def test_an_unfinished_recording_resumes_with_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    record(tmp_path / "whole")
    for _ in range(EPOCHS):
        record(tmp_path, 1)
    whole, cut = (path / "dyn" / "manifest.json" for path in (tmp_path / "whole", tmp_path))
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("name", ["top-ids-0001.npy", "top-p-0002.npy"])
@pytest.mark.parametrize("change", ["flip", "remove"])
def test_damage_is_detected(tmp_path: Path, name: str, change: str) -> None:
    record(tmp_path)
    damage(tmp_path / "dyn" / "run-00" / name, change)
    with pytest.raises(DataError, match=rf"{re.escape(name)} is {'damaged' if change == 'flip' else 'missing'}"):
        Dynamics.open(tmp_path / "dyn")


@pytest.mark.parametrize("name", ["top-ids-0000.npy", "top-p-0000.npy"])
@pytest.mark.parametrize("change", ["flip", "remove"])
def test_damage_of_an_unfinished_recording_is_detected(tmp_path: Path, name: str, change: str) -> None:
    record(tmp_path, 1)
    damage(tmp_path / "dyn" / "run-00" / name, change)
    with pytest.raises(DataError, match=re.escape(name)):
        recorder(tmp_path)


def damage(file: Path, change: str) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.unlink() if change == "remove" else file.write_bytes(content)


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    with recorder(tmp_path) as one, pytest.raises(ShapeError, match="8 columns, but `classes` is 7"):
        one.update([0], torch.zeros(1, C + 1))
    with pytest.raises(UsageError, match="`top_k` is 8 of 7 classes: pass 0 to 7"):
        recorder(tmp_path / "other", top_k=C + 1)
    with pytest.raises(UsageError, match=r"`top_k` is 2\.5: pass a whole number"):
        recorder(tmp_path / "other", top_k=2.5)


def test_another_top_k_is_refused_in_a_folder_with_epochs(tmp_path: Path) -> None:
    record(tmp_path, 1)
    for other in (2, 0):
        with pytest.raises(UsageError, match=rf"settings: `top_k` was 3, is {other}\. Choose"):
            recorder(tmp_path, top_k=other)


KILLED = """
    import os, signal, sys
    sys.path.insert(0, {here!r})
    from pathlib import Path
    import test_predictions
    import kdfast.files.atomic as atomic

    publish = atomic._publish

    def record_until(path, writes):
        def killed(temporary, target):
            nonlocal writes
            if writes == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            writes -= 1
            publish(temporary, target)

        atomic._publish = killed
        test_predictions.record(path)

    status, writes = None, 0
    while status != 0:
        path = Path({path!r}) / str(writes)
        path.mkdir()
        child = os.fork()
        if child == 0:
            try:
                record_until(path, writes)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitpid(child, 0)[1]
        assert status in (0, signal.SIGKILL), status
        writes += 1
"""


@pytest.mark.slow
def test_a_kill_before_any_write_loses_nothing(tmp_path: Path) -> None:
    """Kill -9 before each of the recording's renames in turn; the next process ends with the same bytes."""
    (tmp_path / "whole").mkdir()
    record(tmp_path / "whole")
    wanted = (tmp_path / "whole" / "dyn" / "manifest.json").read_bytes()
    (tmp_path / "cut").mkdir()
    code = textwrap.dedent(KILLED.format(here=str(Path(__file__).parent), path=str(tmp_path / "cut")))
    subprocess.run([sys.executable, "-c", code], check=True)
    cut = list((tmp_path / "cut").iterdir())
    assert len(cut) > 3 * EPOCHS, "plan, labels, mask, three files an epoch, and the final ones"
    for path in cut:
        with recorder(path) as one:
            left = EPOCHS - one.epoch
        record(path, left)
        assert (path / "dyn" / "manifest.json").read_bytes() == wanted
        assert not list(path.rglob(".kdtmp-*"))
        assert not list(path.rglob("epoch-*"))
