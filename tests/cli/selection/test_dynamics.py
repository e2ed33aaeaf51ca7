"""`kdfast dynamics`: what it records on request."""

import json

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
        ran = record(name, *more, "--dry-run", "--runs", 80, "--json")
        assert ran.code == 0
        sizes[name] = json.loads(ran.out)["bytes"]
    features = 120 * 64 * 4 * 80  # of the last epoch of each run, in float32
    assert sizes["plain"] == 120 * 2 * 80 * (4 * 2 + 1 / 8) + features
    assert sizes["batch"] - sizes["plain"] == 120 * 2 * 80 / 8
    assert sizes["top"] - sizes["plain"] == 120 * 2 * 80 * 3 * 3
    assert " and write 2.6 MB to " in record("plain", "--dry-run", "--runs", 80).out
    assert not list(tmp_path.glob("*/plan.json"))


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_refuses_more_classes_than_there_are(record, tmp_path, more) -> None:
    ran = record("d", "--top-k", 1000, *more)
    assert ran.code == 2
    assert "--top-k is 1000 of " in ran.err
    assert not (tmp_path / "d").exists()
