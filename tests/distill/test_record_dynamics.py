import numpy as np
import pytest

from kdfast.distillation.record_dynamics import RecordingConfig, draw_training_mask
from kdfast.errors import UsageError


@pytest.mark.parametrize(("keep", "cycle"), [(0.7, 10), (0.5, 2), (2 / 3, 3), (0.75, 4), (0.05, 20)])
def test_each_sample_is_kept_equally_often_within_a_cycle_of_runs(keep, cycle):
    masks = np.array([draw_training_mask(300, keep, 0, run) for run in range(2 * cycle)])
    for part in (masks[:cycle], masks[cycle:]):
        assert (part.sum(axis=0) == round(keep * cycle)).all()


def test_samples_are_kept_independently_of_each_other():
    n = 20_000
    masks = np.array([draw_training_mask(n, 0.7, 1, run) for run in range(6)])
    assert np.abs(masks.mean(axis=1) - 0.7).max() < 4 * np.sqrt(0.21 / n)
    neighbors = np.corrcoef(masks[0, :-1], masks[0, 1:])[0, 1]
    assert abs(neighbors) < 4 / np.sqrt(n)
    # Seven of ten without replacement: the correlation between two runs' masks is -1 / 9.
    assert np.corrcoef(masks[0], masks[1])[0, 1] == pytest.approx(-1 / 9, abs=4 / np.sqrt(n))


def test_masks_depend_only_on_seed_run_and_sample():
    assert np.array_equal(draw_training_mask(50, 0.7, 0, 3), draw_training_mask(80, 0.7, 0, 3)[:50])
    assert not np.array_equal(draw_training_mask(50, 0.7, 0, 3), draw_training_mask(50, 0.7, 1, 3))
    assert draw_training_mask(20, 1.0, 0, 5).all()


@pytest.mark.parametrize(
    "bad",
    [{"runs": 0}, {"keep": 0.0}, {"keep": 1.1}, {"record_every": 0}, {"features_every": -1}, {"runs": 2, "only": 2}],
)
def test_rejects_settings_out_of_range(bad):
    with pytest.raises(UsageError, match=f"`{list(bad)[-1]}` is {list(bad.values())[-1]}"):
        RecordingConfig(**bad)
