import numpy as np
import pytest

from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError


def test_gray_images_become_rgb(tmp_path, npz):
    gray = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    source = open_source(npz(tmp_path / "a.npz", train_images=gray))
    assert source.train.shape == (16, 16, 3)
    assert np.array_equal(source.train.read([5])[0], np.stack([gray[5]] * 3, -1))
    assert source.classes == ("0", "1", "2")
    assert (source.view_spec.pad, source.view_spec.flip) == (2, False)


def test_accepts_a_column_of_labels(tmp_path, npz):
    source = open_source(npz(tmp_path / "a.npz", train_labels=(np.arange(12) % 3)[:, None]))
    assert source.train.labels.tolist() == [index % 3 for index in range(12)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "lacks test_labels"),
        ({"train_images": np.zeros((12, 16, 16, 3), np.float32)}, "float32: must be uint8"),
        ({"train_images": np.zeros((12, 16, 16, 4), np.uint8)}, r"\(12, 16, 16, 4\): must be"),
        (
            {"train_images": np.zeros((0, 16, 16, 3), np.uint8), "train_labels": np.zeros(0, np.int64)},
            "without a size of 0",
        ),
        ({"train_labels": np.arange(11) % 3}, r"\(11,\): must be one integer per image, \(12,\)"),
        ({"train_labels": np.zeros(12)}, "float64"),
        ({"train_labels": np.arange(12) % 3 - 1}, "smallest training label is -1"),
        ({"train_labels": np.arange(12) % 3 * 2}, "no training sample has label 1"),
        ({"train_labels": np.array([2**60] + [0] * 11)}, "no training sample has label 1"),
        ({"test_labels": np.arange(6)}, "test labels go from 0 to 5, but there are 3 classes"),
        ({"test_images": np.zeros((6, 8, 8, 3), np.uint8)}, "must agree"),
        ({"train_labels": np.array([{}] * 12, object)}, "damaged or not an .npz of plain arrays"),
    ],
)
def test_rejects_wrong_content(tmp_path, npz, changes, message):
    with pytest.raises(DataError, match=message):
        open_source(npz(tmp_path / "a.npz", **changes))


@pytest.mark.parametrize("cut", [0, 3, 500, -100])
def test_rejects_a_truncated_file(tmp_path, npz, cut):
    file = npz(tmp_path / "a.npz")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.npz is damaged"):
        open_source(file)


def arrays(names, count=6, shape=(16, 16), seed=0):
    """Return images and labels under some names, as other programs store them."""
    rng = np.random.default_rng(seed)
    images, labels = names
    return {images: rng.integers(0, 256, (count, *shape), dtype=np.uint8), labels: (np.arange(count) % 3)[:, None]}


def test_reads_medmnist(tmp_path):
    parts = [
        arrays((f"{part}_images", f"{part}_labels"), seed=seed) for seed, part in enumerate(("train", "val", "test"))
    ]
    np.savez(tmp_path / "pathmnist.npz", **parts[0], **parts[1], **parts[2])
    with pytest.warns(match="val_images is not used; the test images are test_images"):
        source = open_source(tmp_path / "pathmnist.npz")
    assert np.array_equal(source.test.read([3])[0, ..., 0], parts[2]["test_images"][3])
    assert source.train.labels.tolist() == [0, 1, 2, 0, 1, 2]
    np.savez(tmp_path / "no_test.npz", **parts[0], **parts[1])
    assert np.array_equal(open_source(tmp_path / "no_test.npz").test.read([3])[0, ..., 0], parts[1]["val_images"][3])


def test_reads_keras(tmp_path):
    np.savez(tmp_path / "mnist.npz", **arrays(("x_train", "y_train")), **arrays(("x_test", "y_test"), count=3))
    source = open_source(tmp_path / "mnist.npz")
    assert (len(source.train), len(source.test)) == (6, 3)


def test_reads_a_single_pair_with_a_rule(tmp_path):
    np.savez(tmp_path / "all.npz", **arrays(("images", "labels"), count=12, shape=(16, 16, 3)))
    with pytest.raises(DataError, match=r"no test split \(looked for test_images, val_images"):
        open_source(tmp_path / "all.npz")
    with pytest.warns(match="has no test split: 3 of 12"):
        assert len(open_source(tmp_path / "all.npz", split=0.25).test) == 3


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ({"train_labels": np.zeros((12, 14), int)}, "train_labels of .* has 14 labels per image: pass data with one"),
        ({"train_images": np.zeros((12, 28, 28, 28), np.uint8)}, r"\(12, 28, 28, 28\): must be \(N, H, W, 3\)"),
        ({"train_images": np.zeros((12, 16, 16), np.uint16)}, "uint16: must be uint8, 0 to 255; rescale"),
        ({"train_images": np.zeros((12, 16, 16), np.float16)}, "float16: must be uint8"),
    ],
)
def test_other_kinds_of_data_are_refused_by_name(tmp_path, npz, held, message):
    with pytest.raises(DataError, match=message):
        open_source(npz(tmp_path / "a.npz", **held))
