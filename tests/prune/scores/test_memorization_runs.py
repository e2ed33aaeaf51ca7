"""How many runs memorization needs."""

import re

import numpy as np
import pytest

from kdfast.dynamics import Dynamics, DynamicsRecorder
from kdfast.errors import DataError, UsageError
from kdfast.pruning.scores.base import ScoreInputs
from kdfast.pruning.scores.memorization import memorization_stderr
from kdfast.pruning.scores.registry import compute_score


@pytest.mark.parametrize(("runs", "keep"), [(20, 0.7), (64, 0.7), (40, 0.5)])
def test_standard_error_is_that_of_simulated_runs(runs, keep):
    """Samples on which every run is correct with probability 1/2 have the score 0; their scores deviate from it."""
    rng = np.random.default_rng(0)
    inside = round(runs * keep)
    hits = rng.random((40_000, runs)) < 0.5
    scores = hits[:, :inside].mean(axis=1) - hits[:, inside:].mean(axis=1)
    assert memorization_stderr(runs, keep) == pytest.approx(np.sqrt((scores**2).mean()), rel=0.02)


def test_half_the_standard_error_takes_four_times_the_runs():
    assert memorization_stderr(256, 0.7) == pytest.approx(memorization_stderr(64, 0.7) / 2)


@pytest.mark.parametrize(
    ("runs", "keep", "name"), [(0, 0.7, "`runs` is 0"), (9, 1.0, "`keep` is 1.0"), (9, 0, "`keep`")]
)
def test_standard_error_needs_runs_on_both_sides(runs, keep, name):
    with pytest.raises(UsageError, match=name):
        memorization_stderr(runs, keep)


def test_error_about_too_few_runs_says_how_many_are_needed(tmp_path):
    labels = np.arange(6) % 2
    with DynamicsRecorder(tmp_path / "dyn", 6, labels, epochs=1, mask=labels > 0) as recorder:
        recorder.update(np.arange(6), np.eye(2, dtype=np.float32)[labels])
        recorder.end_epoch()
    with pytest.raises(DataError) as caught:
        compute_score("memorization", ScoreInputs(labels, 0, dynamics=Dynamics.open(tmp_path / "dyn")))
    message = str(caught.value)
    assert "at least 20 runs" in message
    promised = re.findall(r"([0-9.]+) with (\d+) runs", message)
    assert [int(runs) for _, runs in promised] == [20, 64, 2000]
    for error, runs in promised:
        assert float(error) == pytest.approx(memorization_stderr(int(runs), 0.7), rel=0.05)
