from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from kdfast.data.augment.crops import crop_boxes
from kdfast.data.stateless_random import Purpose, hash64

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def boxes(count: int, size=(256, 256), scale=SCALE, ratio=RATIO, flip=True):
    keys = hash64(Purpose.CROP, 0, np.arange(count), 1)
    return crop_boxes(keys, size, scale=scale, ratio=ratio, flip=flip, whole=np.zeros(count, bool))


def test_values_never_change():
    keys = hash64(Purpose.CROP, 0, np.array([0, 1, 2, 49_999, 1_281_166]), 1)
    drawn = crop_boxes(keys, (256, 256), scale=SCALE, ratio=RATIO, flip=True, whole=np.zeros(5, bool))
    assert drawn.tolist() == [
        [9, 41, 237, 194, 0],
        [1, 34, 238, 215, 1],
        [35, 62, 65, 85, 1],
        [3, 35, 252, 195, 1],
        [88, 111, 161, 126, 1],
    ]


@pytest.mark.parametrize("size", [(256, 256), (9, 300), (1, 1)])
def test_boxes_lie_in_the_image(size):
    top, left, height, width, flip = boxes(20_000, size).T
    assert min(top.min(), left.min()) >= 0
    assert min(height.min(), width.min()) >= 1
    assert (top + height).max() <= size[0]
    assert (left + width).max() <= size[1]
    assert set(flip) == {0, 1}


def test_area_and_ratio_have_the_requested_distributions():
    # Small boxes always fit, so none is drawn again and the distributions are exact up to rounding to pixels.
    _, _, height, width, _ = boxes(20_000, (4096, 4096), scale=(0.1, 0.4)).T
    assert stats.kstest(height * width / 4096**2, "uniform", args=(0.1, 0.3)).pvalue > 1e-3
    logs = np.log(width / height)
    assert stats.kstest(logs, "uniform", args=(math.log(3 / 4), math.log(16 / 9))).pvalue > 1e-3


def test_positions_and_flips_are_uniform():
    top, left, height, width, flip = boxes(20_000, (4096, 4096), scale=(0.1, 0.4)).T
    for start, length in ((top, height), (left, width)):
        assert stats.kstest((start + 0.5) / (4096 - length + 1), "uniform").pvalue > 1e-3
    assert stats.binomtest(int(flip.sum()), len(flip)).pvalue > 1e-3


def test_no_box_is_mirrored_without_flip():
    assert boxes(1000, flip=False)[:, 4].sum() == 0
    assert (boxes(1000, flip=False)[:, :4] == boxes(1000)[:, :4]).all()


def test_box_is_the_whole_image_on_request_or_if_nothing_fits():
    whole = np.arange(6) % 2 == 0
    drawn = crop_boxes(hash64(1, np.arange(6)), (50, 40), scale=SCALE, ratio=RATIO, flip=True, whole=whole)
    assert (drawn[whole] == [0, 0, 50, 40, 0]).all()
    assert (drawn[~whole, 2:4] != [50, 40]).any(axis=1).all()
    tall = boxes(100, (10, 1000), scale=(0.9, 1.0))  # a nearly square box of that area is taller than the image
    assert (tall[:, :4] == [0, 0, 10, 1000]).all()
