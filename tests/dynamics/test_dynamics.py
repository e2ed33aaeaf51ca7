import json
import shutil

import numpy as np
import pytest
import torch
from torch.testing._internal.two_tensor import TwoTensor

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.dynamics.metrics import el2n, el2n_without_cancellation
from kdfast.errors import DataError, OutputError, ShapeError, UsageError

N, C, D = 37, 4, 5
LABELS = np.arange(N) % C


def logits_of(run, epoch):
    return torch.from_numpy(np.random.default_rng((run, epoch)).normal(0, 3, (N, C)).astype(np.float32))


def features_of(run, epoch):
    return np.random.default_rng((run, epoch, 1)).normal(0, 1, (N, D)).astype(np.float32)


def update_all(recorder, run, epoch, batch=10):
    order = np.random.default_rng((run, epoch, 2)).permutation(N)
    for start in range(0, N, batch):
        ids = order[start : start + batch]
        features = features_of(run, epoch)[ids] if recorder.wants_features else None
        recorder.update(torch.from_numpy(ids), logits_of(run, epoch)[ids], features)


def record(path, runs=2, epochs=3, **more):
    for run in range(runs):
        with DynamicsRecorder(path, N, LABELS, epochs=epochs, run=run, runs=runs, **more) as recorder:
            for epoch in range(recorder.epoch, epochs):
                update_all(recorder, run, epoch)
                recorder.end_epoch()
    return path


def test_metrics_match_plain_loops(tmp_path):
    dynamics = Dynamics.open(record(tmp_path / "dyn", feature_epochs=(0, 2)), labels=LABELS)
    assert (dynamics.runs, dynamics.epochs, dynamics.n) == (2, 3, N)
    for run in range(2):
        for epoch in range(3):
            for i, (z, y) in enumerate(zip(logits_of(run, epoch).double().numpy(), LABELS, strict=True)):
                p = np.exp(z) / np.exp(z).sum()
                one = np.zeros(C)
                one[y] = 1
                assert dynamics.p_y(run)[epoch, i] == pytest.approx(p[y], rel=1e-3, abs=1e-6)
                other = max(p[k] for k in range(C) if k != y)
                assert dynamics.p_other(run)[epoch, i] == pytest.approx(other, rel=1e-3, abs=1e-6)
                margin = z[y] - max(z[k] for k in range(C) if k != y)
                assert dynamics.margin(run)[epoch, i] == pytest.approx(margin, rel=1e-3, abs=1e-3)
                assert dynamics.el2n(run)[epoch, i] == pytest.approx(np.sqrt(((p - one) ** 2).sum()), rel=1e-3)
                assert dynamics.correct(run)[epoch, i] == (z.argmax() == y)
        assert dynamics.mask(run).all()
    assert np.array_equal(dynamics.features(1, 2), features_of(1, 2))
    for array in (dynamics.p_y(0), dynamics.p_other(0), dynamics.margin(0), dynamics.el2n(0)):
        assert array.dtype == np.float16
        assert array.shape == (3, N)
        assert isinstance(array, np.memmap)


def test_correctness_is_stored_as_bits(tmp_path):
    record(tmp_path / "dyn")
    assert np.load(tmp_path / "dyn" / "run-00" / "correct.npy").shape == (3, -(-N // 8))


def test_last_values_of_a_sample_given_twice_count(tmp_path):
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=1) as recorder:
        recorder.update(np.arange(N), torch.zeros(N, C))
        sure = torch.zeros(1, C)
        sure[0, LABELS[5]] = 50
        recorder.update([5], sure)
        recorder.end_epoch()
    p = Dynamics.open(tmp_path / "dyn").p_y(0)[0]
    assert p[5] == 1
    assert p[4] == 0.25


def test_rejects_an_epoch_with_missing_samples(tmp_path):
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=2) as recorder:
        recorder.update(np.arange(N - 2), torch.zeros(N - 2, C))
        with pytest.raises(DataError, match=rf"epoch 0: 2 of {N} samples were never given \(for example {N - 2}\)"):
            recorder.end_epoch()


def test_rejects_missing_epochs(tmp_path):
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=3) as recorder:
        update_all(recorder, 0, 0)
        recorder.end_epoch()
    with pytest.raises(DataError, match=r"run-00 has 1 of 3 epochs"):
        Dynamics.open(tmp_path / "dyn")


def test_rejects_missing_runs(tmp_path):
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=1, run=0, runs=2) as recorder:
        update_all(recorder, 0, 0)
        recorder.end_epoch()
    with pytest.raises(DataError, match="unfinished"):
        Dynamics.open(tmp_path / "dyn")


def test_recording_resumes_at_its_epoch(tmp_path):
    for epoch in range(3):
        with DynamicsRecorder(tmp_path / "cut", N, LABELS, epochs=3) as recorder:
            assert recorder.epoch == epoch
            update_all(recorder, 0, epoch)
            recorder.end_epoch()
            assert recorder.finished == (epoch == 2)
    record(tmp_path / "whole", runs=1)
    for file in ("p_y.npy", "margin.npy", "el2n.npy", "p_other.npy", "correct.npy", "mask.npy", "sealed.json"):
        assert (tmp_path / "cut/run-00" / file).read_bytes() == (tmp_path / "whole/run-00" / file).read_bytes()
    assert (tmp_path / "cut/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()
    assert not list((tmp_path / "cut").rglob("epoch-*"))


def test_rewind_discards_epochs(tmp_path):
    with DynamicsRecorder(tmp_path / "cut", N, LABELS, epochs=3) as recorder:
        for epoch in (7, 8):
            update_all(recorder, 0, epoch)
            recorder.end_epoch()
        recorder.rewind(0)
        for epoch in range(3):
            update_all(recorder, 0, epoch)
            recorder.end_epoch()
        with pytest.raises(UsageError, match="cannot go back"):
            recorder.rewind(1)
    record(tmp_path / "whole", runs=1)
    assert (tmp_path / "cut/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_resumes_a_kill_between_the_last_epoch_and_the_seal(tmp_path):
    record(tmp_path / "whole", runs=1)
    with DynamicsRecorder(tmp_path / "cut", N, LABELS, epochs=3) as recorder:
        recorder._complete = lambda: None
        for epoch in range(3):
            update_all(recorder, 0, epoch)
            recorder.end_epoch()
    with DynamicsRecorder(tmp_path / "cut", N, LABELS, epochs=3) as recorder:
        assert recorder.finished
    assert (tmp_path / "cut/manifest.json").read_bytes() == (tmp_path / "whole/manifest.json").read_bytes()


def test_runs_can_be_added_later(tmp_path):
    record(tmp_path / "dyn", runs=1)
    first = Dynamics.open(tmp_path / "dyn").p_y(0).copy()
    record(tmp_path / "dyn", runs=2)
    both = Dynamics.open(tmp_path / "dyn")
    assert both.runs == 2
    assert np.array_equal(both.p_y(0), first)


def test_mask_is_stored(tmp_path):
    mask = np.random.default_rng(0).random(N) < 0.7
    record(tmp_path / "dyn", runs=1, mask=mask)
    assert np.array_equal(Dynamics.open(tmp_path / "dyn").mask(0), mask)
    with pytest.raises(UsageError, match="other"):
        DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=4)


@pytest.mark.parametrize("name", ["run-00/p_y.npy", "run-01/correct.npy", "labels.npy", "manifest.json"])
def test_detects_one_changed_byte(tmp_path, name):
    path = record(tmp_path / "dyn") / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DataError, match="damaged"):
        Dynamics.open(tmp_path / "dyn")


def test_detects_a_missing_file(tmp_path):
    (record(tmp_path / "dyn") / "run-01" / "margin.npy").unlink()
    with pytest.raises(DataError, match="missing"):
        Dynamics.open(tmp_path / "dyn", check_files=False)


def test_rejects_other_data(tmp_path):
    record(tmp_path / "dyn", fingerprint="a" * 64)
    Dynamics.open(tmp_path / "dyn", labels=LABELS, fingerprint="a" * 64)
    with pytest.raises(DataError, match="other data"):
        Dynamics.open(tmp_path / "dyn", fingerprint="b" * 64)
    with pytest.raises(DataError, match="or other labels"):
        Dynamics.open(tmp_path / "dyn", labels=(LABELS + 1) % C)
    with pytest.raises(DataError, match=f"{N} samples, this data has {N - 1}"):
        Dynamics.open(tmp_path / "dyn", labels=LABELS[:-1])


@pytest.mark.parametrize("text", ["{}", '{"format": "geojson"}', "my plan"])
def test_rejects_a_foreign_plan_without_advice_to_delete_it(tmp_path, text):
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(OutputError, match=r"plan\.json\) and holds no dynamics: choose another folder"):
        DynamicsRecorder(tmp_path, N, LABELS, epochs=1)
    assert (tmp_path / "plan.json").read_text() == text


def test_rejects_foreign_folders(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(OutputError, match="holds no dynamics"):
        DynamicsRecorder(tmp_path / "mine", N, LABELS, epochs=1)
    assert [f.name for f in (tmp_path / "mine").iterdir() if f.name[0] != "."] == ["thesis.txt"]
    with pytest.raises(DataError, match="holds no dynamics: record them with kdfast dynamics"):
        Dynamics.open(tmp_path / "mine")


def test_other_settings_replace_runs_without_an_epoch(tmp_path):
    """Training that diverges at once leaves a plan and a mask; the corrected run must not be refused."""
    with (
        DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=3, facts={"lr": 10.0}),
        pytest.raises(UsageError, match="delete this one"),  # another process may be recording
    ):
        DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=3, run=1, runs=2, facts={"lr": 0.1})
    others = {"facts": {"lr": 0.1}, "mask": np.arange(N) > 3}
    record(tmp_path / "dyn", runs=1, **others)
    assert Dynamics.open(tmp_path / "dyn").facts == {"lr": 0.1}
    with pytest.raises(UsageError, match="other data or settings"):
        DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=3, facts={"lr": 10.0})


def test_other_settings_do_not_replace_a_recorded_epoch(tmp_path):
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=3) as recorder:
        update_all(recorder, 0, 0)
        recorder.end_epoch()
    with pytest.raises(UsageError, match="other data or settings"):
        DynamicsRecorder(tmp_path / "dyn", N, (LABELS + 1) % C, epochs=3)
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=3) as recorder:
        assert recorder.epoch == 1


def test_rejects_a_second_writer(tmp_path):
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=1), pytest.raises(OutputError, match="in use"):
        DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=1)


BAD_UPDATES = {
    "ids out of range": (([N], torch.zeros(1, C)), DataError, "37"),
    "negative ids": (([-1], torch.zeros(1, C)), DataError, "-1"),
    "a mask for ids": ((np.ones(N, bool), torch.zeros(N, C)), ShapeError, "integers"),
    "meta ids": (
        (torch.zeros(1, dtype=torch.int64, device="meta"), torch.zeros(1, C)),
        DataError,
        "sample ids are not",
    ),
    "meta logits": (([1], torch.zeros(1, C, device="meta")), ShapeError, "on the meta device.*pass real numbers"),
    "meta features": (([1], torch.zeros(1, C), torch.zeros(1, D, device="meta")), ShapeError, "features are on the"),
    "no ids": ((np.zeros(0, np.int64), torch.zeros(0, C)), ShapeError, "at least one"),
    "another length": (([1, 2], torch.zeros(1, C)), ShapeError, "2 samples"),
    "too few classes": (([1], torch.zeros(1, C - 1)), ShapeError, "4 classes"),
    "NaN": (([1], torch.full((1, C), torch.nan)), DataError, "not finite in epoch 0"),
    "no features": (([1], torch.zeros(1, C)), DataError, "pass `features` to update"),
    "features of another length": (([1], torch.zeros(1, C), torch.zeros(2, D)), ShapeError, "1 samples"),
    "features that are not finite": (([1], torch.zeros(1, C), torch.full((1, D), torch.inf)), DataError, "finite"),
}


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_rejects_bad_updates(tmp_path, case):
    arguments, kind, message = BAD_UPDATES[case]
    recorder = DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=1, feature_epochs=(0,))
    with recorder, pytest.raises(kind, match=message):
        recorder.update(*arguments)


def test_rejects_logits_whose_values_are_elsewhere(tmp_path):
    logits = TwoTensor(torch.zeros(1, C), torch.zeros(1, C))
    with (
        DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=1) as recorder,
        pytest.raises(ShapeError, match=r"logits: it is a TwoTensor, .*pass a plain tensor"),
    ):
        recorder.update([1], logits)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation")
def test_rejects_quantized_logits(tmp_path):
    logits = torch.quantize_per_tensor(torch.zeros(1, C), 0.1, 0, torch.qint8)
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=1) as recorder:
        with pytest.raises(ShapeError, match="logits are quantized: pass real numbers"):
            recorder.update([1], logits)
        with pytest.raises(DataError, match="sample ids are not an array"):
            recorder.update(logits[0], torch.zeros(C, C))


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"epochs": 0}, UsageError),
        ({"run": 1}, UsageError),
        ({"feature_epochs": (2,)}, UsageError),
        ({"mask": np.ones(3, bool)}, DataError),
        ({"mask": np.zeros(N, bool)}, DataError),
        ({"mask": np.ones(N)}, DataError),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, change, kind):
    with pytest.raises(kind):
        DynamicsRecorder(tmp_path / "dyn", N, LABELS, **{"epochs": 2, **change})
    assert not (tmp_path / "dyn").exists()


def test_rejects_epochs_after_the_last(tmp_path):
    record(tmp_path / "dyn", runs=1)
    with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=3) as recorder:
        with pytest.raises(UsageError, match="all 3 epochs"):
            recorder.update([0], torch.zeros(1, C))
        with pytest.raises(UsageError, match="all 3 epochs"):
            recorder.end_epoch()


@pytest.mark.parametrize("name", ["mask.npy", "epoch-000"])
def test_error_names_a_damaged_file_of_an_unfinished_run(tmp_path, name):
    def one_epoch(epoch):
        with DynamicsRecorder(tmp_path / "dyn", N, LABELS, epochs=2, run=0, runs=1) as recorder:
            update_all(recorder, 0, epoch)
            recorder.end_epoch()

    one_epoch(0)
    (part,) = (tmp_path / "dyn").rglob(f"{name}*")
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(DataError, match=r"is damaged.*delete .*run-00 and record that run again"):
        one_epoch(1)


def test_rejects_reading_features_that_were_not_recorded(tmp_path):
    dynamics = Dynamics.open(record(tmp_path / "dyn", feature_epochs=(1,)))
    with pytest.raises(UsageError, match="after 2 epochs of training, not after 3"):
        dynamics.features(0, 2)
    with pytest.raises(UsageError, match="runs 0 to 1, not 2"):
        dynamics.p_y(2)


def test_rejects_another_version(tmp_path):
    from kdfast.files import read_sealed, write_sealed

    path = record(tmp_path / "dyn") / "manifest.json"
    write_sealed(path, {**read_sealed(path), "version": 3})
    with pytest.raises(DataError, match="version"):
        Dynamics.open(tmp_path / "dyn")
    assert json.loads(path.read_text())["version"] == 3


def test_copied_folder_opens(tmp_path):
    shutil.copytree(record(tmp_path / "dyn"), tmp_path / "copy")
    assert Dynamics.open(tmp_path / "copy").digest == Dynamics.open(tmp_path / "dyn").digest


def test_both_forms_of_el2n_agree_until_p_y_rounds_to_one():
    labels = torch.tensor([0, 1, 2])
    logits = torch.randn(3, 4, dtype=torch.float64)
    torch.testing.assert_close(el2n_without_cancellation(logits, labels), el2n(logits.softmax(1), labels))
    confident = torch.tensor([[50.0, 0.0]], dtype=torch.float64)
    # p = (1 - q, q) with q = exp(-50), so the norm is sqrt(2) q.
    expected = 2**0.5 * np.exp(-50)
    assert el2n_without_cancellation(confident, labels[:1]).item() == pytest.approx(expected, rel=1e-12)
    assert el2n(confident.softmax(1), labels[:1]).item() == pytest.approx(np.exp(-50), rel=1e-12)
