"""`kdfast dynamics`: what it records on request."""

import numpy as np
import pytest

COMMON = ["--net", "resnet8", "--epochs", 2, "--batch-size", 20]


@pytest.fixture
def record(kdfast, tiny, tmp_path):
    """Return a function that records to a folder and returns what it printed."""

    def run(name: str, *more: object):
        return kdfast("dynamics", "--data", tiny, *COMMON, "--out", tmp_path / name, *more)

    return run


def opened(path):
    from kdfast.dynamics.reader import Dynamics

    return Dynamics.open(path)


def test_keeps_predictions(record, tmp_path) -> None:
    assert record("d", "--top-k", 2).code == 0
    dynamics = opened(tmp_path / "d")
    labels = np.asarray(dynamics.labels)
    for epoch in range(2):
        ids, p = dynamics.top(0, epoch)
        assert ids.shape == p.shape == (120, 2)
        # Either the label is first, with its probability, or another class is.
        first = np.where(ids[:, 0] == labels, dynamics.p_y(0)[epoch], dynamics.p_other(0)[epoch])
        assert np.array_equal(p[:, 0], first)


def test_records_batches(record, tmp_path) -> None:
    assert record("d", "--record", "batch").code == 0
    dynamics = opened(tmp_path / "d")
    before, after = (dynamics.correct(0, when=when) for when in ("batch", "epoch"))
    assert before[0].mean() < after[0].mean(), "the first epoch begins with an untrained network"
    assert before[1].mean() > 0.5
    ran = record("d")
    assert ran.code == 2
    assert '--record was "batch", is "epoch"' in ran.err


def test_a_dry_run_prints_the_size_of_the_files(record, tmp_path) -> None:
    sizes = {}
    for name, more in {"plain": (), "batch": ("--record", "batch"), "top": ("--top-k", 3)}.items():
        ran = record(name, *more, "--dry-run", "--runs", 10_000)
        assert ran.code == 0
        sizes[name] = float(ran.out.split(" write ")[1].split(" MB")[0])
    features = 120 * 64 * 4 * 10_000  # of the last epoch of each run, in float32
    assert sizes["plain"] == pytest.approx((120 * 2 * 10_000 * (4 * 2 + 1 / 8) + features) / 1e6, abs=0.05)
    assert sizes["batch"] - sizes["plain"] == pytest.approx(120 * 2 * 10_000 / 8 / 1e6, abs=0.1)
    assert sizes["top"] - sizes["plain"] == pytest.approx(120 * 2 * 10_000 * 3 * 3 / 1e6, abs=0.1)
    assert not list(tmp_path.glob("*/plan.json"))


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_refuses_more_classes_than_there_are(record, tmp_path, more) -> None:
    ran = record("d", "--top-k", 1000, *more)
    assert ran.code == 2
    assert "--top-k is 1000 of " in ran.err
    assert not (tmp_path / "d").exists()
