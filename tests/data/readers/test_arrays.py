import numpy as np
import pytest
from scipy.io import loadmat, savemat

from kdfast.data.readers.arrays import listing, open_digits
from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError


def test_svhn(tmp_path, svhn):
    folder = svhn(tmp_path / "svhn")
    source = open_source(folder)
    raw = loadmat(folder / "train_32x32.mat")
    assert np.array_equal(source.train.read([3])[0], raw["X"][..., 3])
    assert raw["y"][9] == 10
    assert source.train.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert (source.views.pad, source.views.flip, source.views.count) == (4, False, 81)


@pytest.mark.parametrize("name", ["train_32x32.mat", "test_32x32.mat"])
def test_svhn_missing_file(tmp_path, svhn, name):
    folder = svhn(tmp_path / "svhn")
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"lacks {name}"):
        open_source(folder)


@pytest.mark.parametrize("cut", [0, 100, 3000, -7])
def test_svhn_truncated(tmp_path, svhn, cut):
    file = svhn(tmp_path / "svhn") / "train_32x32.mat"
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"train_32x32\.mat is damaged"):
        open_source(file.parent)


@pytest.mark.parametrize(
    "content",
    [
        {"X": np.zeros((32, 32, 3, 4), np.uint8)},
        {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((3, 1), np.uint8)},
        {"X": np.zeros((32, 32, 4), np.uint8), "y": np.ones((4, 1), np.uint8)},
        {"X": np.zeros((32, 32, 3, 4)), "y": np.ones((4, 1), np.uint8)},
        {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.full((4, 1), 11, np.uint8)},
    ],
)
def test_svhn_wrong_content(tmp_path, svhn, content):
    folder = svhn(tmp_path / "svhn")
    savemat(folder / "test_32x32.mat", content)
    with pytest.raises(DataError):
        open_source(folder)


def test_npz_grey_images_become_rgb(tmp_path, npz):
    grey = np.random.default_rng(0).integers(0, 256, (12, 16, 16), dtype=np.uint8)
    source = open_source(npz(tmp_path / "a.npz", train_images=grey))
    assert source.train.shape == (16, 16, 3)
    assert np.array_equal(source.train.read([5])[0], np.stack([grey[5]] * 3, -1))
    assert source.classes == ("0", "1", "2")
    assert (source.views.pad, source.views.flip) == (2, False)


def test_npz_column_of_labels(tmp_path, npz):
    source = open_source(npz(tmp_path / "a.npz", train_labels=(np.arange(12) % 3)[:, None]))
    assert source.train.labels.tolist() == [index % 3 for index in range(12)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_labels": None}, "lacks test_labels"),
        ({"train_images": np.zeros((12, 16, 16, 3), np.float32)}, "float32; needed: uint8"),
        ({"train_images": np.zeros((12, 16, 16, 4), np.uint8)}, r"\(12, 16, 16, 4\); needed"),
        ({"train_images": np.zeros((0, 16, 16, 3), np.uint8), "train_labels": np.zeros(0, np.int64)}, "none of them 0"),
        ({"train_labels": np.arange(11) % 3}, r"\(11,\); needed: one integer per image, \(12,\)"),
        ({"train_labels": np.zeros(12)}, "float64"),
        ({"train_labels": np.arange(12) % 3 - 1}, "smallest training label is -1"),
        ({"train_labels": np.arange(12) % 3 * 2}, "no training sample has label 1"),
        ({"train_labels": np.array([2**60] + [0] * 11)}, "no training sample has label 1"),
        ({"test_labels": np.arange(6)}, "test labels go from 0 to 5, but there are 3 classes"),
        ({"test_images": np.zeros((6, 8, 8, 3), np.uint8)}, "must agree"),
        ({"train_labels": np.array([{}] * 12, object)}, "damaged or not an .npz of plain arrays"),
    ],
)
def test_npz_wrong_content(tmp_path, npz, changes, message):
    with pytest.raises(DataError, match=message):
        open_source(npz(tmp_path / "a.npz", **changes))


@pytest.mark.parametrize("cut", [0, 3, 500, -100])
def test_npz_truncated(tmp_path, npz, cut):
    file = npz(tmp_path / "a.npz")
    file.write_bytes(file.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"a\.npz is damaged"):
        open_source(file)


def test_digits_split_is_fixed_and_stratified():
    source = open_digits()
    assert (len(source.train), len(source.test)) == (1442, 355)
    counts = np.bincount(source.test.labels)
    assert counts.tolist() == [35, 36, 35, 36, 36, 36, 36, 35, 34, 36]
    assert source.fingerprint == open_digits().fingerprint
    assert (source.views.pad, source.views.flip, source.views.count) == (1, False, 9)
    pixels = source.train.read(range(100))
    assert (pixels.min(), pixels.max()) == (0, 255)
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_digits_cover_the_bundle():
    from sklearn.datasets import load_digits

    source = open_digits()
    both = np.concatenate([split.read(range(len(split)))[..., 0] for split in (source.train, source.test)])
    bundle = np.rint(load_digits().images * (255 / 16)).astype(np.uint8)
    assert sorted(image.tobytes() for image in both) == sorted(image.tobytes() for image in bundle)


def test_listing():
    assert listing([]) == "nothing"
    assert listing("fedcba") == "a, b, c, d, e and 1 more"
