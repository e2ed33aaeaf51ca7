import hashlib
import json

import numpy as np
import pytest

from kdfast.data import source as module
from kdfast.data.source import (
    ArraySplit,
    DataDigest,
    check_epoch_ids,
    check_sample_ids,
    compute_fingerprint,
    compute_normalization,
    default_view_spec,
)
from kdfast.errors import DataError, SubsetError


def test_fingerprint_is_the_documented_digest(split):
    data = split(10)
    head = json.dumps({"classes": 3, "samples": 10, "shape": [8, 8, 3]}).encode()
    expected = hashlib.sha256(head + data.images.tobytes() + data.labels.tobytes()).hexdigest()
    assert compute_fingerprint(data, 3) == expected


def test_fingerprint_does_not_depend_on_blocks(split, monkeypatch):
    data = split(50)
    whole = compute_fingerprint(data, 3)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 7 * 8 * 8 * 3)
    assert compute_fingerprint(data, 3) == whole


@pytest.mark.parametrize("change", ["pixel", "label", "order", "classes", "count"])
def test_fingerprint_depends_on(split, change):
    data, classes = split(10), 3
    images, labels = data.images.copy(), data.labels.copy()
    if change == "pixel":
        images[9, 7, 7, 2] ^= 1
    if change == "label":
        labels[0] = 2
    if change == "order":
        images, labels = images[::-1], labels[::-1]
    if change == "classes":
        classes = 4
    if change == "count":
        images, labels = images[:9], labels[:9]
    assert compute_fingerprint(ArraySplit(images, labels, "x"), classes) != compute_fingerprint(data, 3)


def test_fingerprint_depends_on_the_shape():
    pixels = np.zeros((1, 4, 9, 3), np.uint8)
    digests = set()
    for shape in ((4, 9, 3), (6, 6, 3)):
        digest = DataDigest(1, 1, shape)
        digest.update(pixels.reshape(1, *shape))
        digests.add(digest.finish(np.zeros(1, np.int64)))
    assert len(digests) == 2


def test_normalization_matches_numpy(split, monkeypatch):
    data = split(30)
    monkeypatch.setattr(module, "_BLOCK_BYTES", 7 * 8 * 8 * 3)
    norm = compute_normalization(data)
    scaled = data.images.astype(np.float64) / 255
    np.testing.assert_allclose(norm.mean, scaled.mean((0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(norm.std, scaled.std((0, 1, 2)), rtol=1e-12)


def test_rejects_a_constant_channel(split):
    data = split(5)
    data.images[..., 1] = 9
    with pytest.raises(DataError, match="constant"):
        compute_normalization(data)


@pytest.mark.parametrize(
    "ids", [[0.0, 1.0], np.zeros(3, bool), [[0, 1]], 3, [-1], [10], [2**62], np.array([2**64 - 1], np.uint64), ["0"]]
)
def test_index_array_rejects(ids):
    with pytest.raises(SubsetError):
        check_sample_ids(ids, 10)


def test_message_about_a_mask_names_flatnonzero():
    with pytest.raises(SubsetError, match=r"np\.flatnonzero"):
        check_sample_ids(np.ones(10, bool), 10)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, np.int64])
def test_index_array_copies(dtype):
    given = np.array([3, 1, 2], dtype)
    ids = check_sample_ids(given, 4)
    given[:] = 0
    assert ids.dtype == np.int64
    assert ids.tolist() == [3, 1, 2]
    assert check_sample_ids(np.arange(10, dtype=dtype)[::3], 10).flags.c_contiguous


@pytest.mark.parametrize(("ids", "batch"), [([], 4), ([1, 2, 1], 4), ([1], 0), (np.zeros(0, np.int64), 1)])
def test_epoch_ids_rejects(ids, batch):
    with pytest.raises(SubsetError):
        check_epoch_ids(ids, 10, batch)


def test_default_view_spec():
    assert default_view_spec((8, 8, 3), flip=False).pad == 1
    assert default_view_spec((2, 2, 3), flip=False).pad == 1
    assert default_view_spec((40, 32, 3), flip=True).count == 162
    crop = default_view_spec((100, 64, 3), flip=True)
    assert (crop.kind, crop.size, crop.count) == ("crop", (100, 64), 128)
