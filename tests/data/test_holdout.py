import numpy as np
import pytest

from kdfast.data.holdout import SplitPart, hold_out
from kdfast.data.source import ArraySplit
from kdfast.errors import DataError, SubsetError


def test_held_out_set_covers_every_class_and_is_disjoint_from_the_pool():
    labels = np.repeat(np.arange(3), [1000, 60, 7])
    pool, held = hold_out(labels, 3, seed=5)
    assert np.bincount(labels[held]).tolist() == [50, 20, 3]
    np.testing.assert_array_equal(np.sort(np.concatenate([pool, held])), np.arange(1067))
    assert not np.array_equal(held, hold_out(labels, 3, seed=6)[1])


def test_values_never_change():
    assert hold_out(np.arange(40) % 2, 2, share=0.1, least=3, seed=7)[1].tolist() == [9, 29, 30, 32, 35, 38]


@pytest.mark.parametrize("size", [0, 1])
def test_a_class_too_small_to_hold_out_stays_in_the_pool(size):
    labels = np.repeat(np.arange(3), [10, size, 10])
    pool, held = hold_out(labels, 3)
    assert np.bincount(labels[pool], minlength=3).tolist() == [5, size, 5]
    assert np.bincount(labels[held], minlength=3).tolist() == [5, 0, 5]


def test_rejects_classes_of_single_samples():
    with pytest.raises(DataError, match="single training sample"):
        hold_out(np.arange(3), 3)


def test_rejects_labels_unknown_to_the_teacher():
    with pytest.raises(DataError, match="the teacher has the classes 0 to 1"):
        hold_out(np.array([0, 1, 2] * 5), 2)


def test_a_part_of_a_split_numbers_its_samples_anew():
    images = np.arange(10, dtype=np.uint8).repeat(2 * 2 * 3).reshape(10, 2, 2, 3)
    part = SplitPart(ArraySplit(images, np.arange(10) * 2, "ten"), [7, 2, 5])
    assert (len(part), part.shape, part.labels.tolist()) == (3, (2, 2, 3), [14, 4, 10])
    assert part.read([2, 0])[:, 0, 0, 0].tolist() == [5, 7]
    with pytest.raises(SubsetError, match="ids 0 to 2"):
        part.read([3])
    with pytest.raises(SubsetError, match="ids 0 to 9"):
        SplitPart(ArraySplit(images, np.arange(10), "ten"), [10])
