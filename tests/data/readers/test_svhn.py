import numpy as np
import pytest
from scipy.io import loadmat, savemat

from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError, DataWarning


def test_labels_and_pixels_match_the_file(tmp_path, svhn):
    folder = svhn(tmp_path / "svhn")
    source = open_source(folder)
    raw = loadmat(folder / "train_32x32.mat")
    assert np.array_equal(source.train.read([3])[0], raw["X"][..., 3])
    assert raw["y"][9] == 10
    assert source.train.labels[:10].tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0]
    assert (source.view_spec.pad, source.view_spec.flip, source.view_spec.count) == (4, False, 81)


@pytest.mark.parametrize("name", ["train_32x32.mat", "test_32x32.mat"])
def test_missing_file_is_named(tmp_path, svhn, name):
    folder = svhn(tmp_path / "svhn")
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"lacks {name}"):
        open_source(folder)


@pytest.mark.parametrize("cut", [0, 100, 3000, -7])
def test_truncated_file_is_named(tmp_path, svhn, cut):
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
def test_rejects_wrong_content(tmp_path, svhn, content):
    folder = svhn(tmp_path / "svhn")
    savemat(folder / "test_32x32.mat", content)
    with pytest.raises(DataError) as caught:
        open_source(folder)
    assert "\n" not in str(caught.value)


def test_rejects_matlab_7_3_files(tmp_path, svhn):
    file = svhn(tmp_path / "svhn") / "train_32x32.mat"
    head = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM"
    file.write_bytes(head.ljust(512, b"\0") + b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(DataError, match=r"train_32x32\.mat is damaged or not a MATLAB 5 file"):
        open_source(file.parent)


def test_the_extra_digits_are_left_out_and_named(tmp_path, svhn):
    folder = svhn(tmp_path / "svhn")
    assert open_source(folder).notes == ()
    before = open_source(folder).fingerprint
    savemat(folder / "extra_32x32.mat", {"X": np.zeros((32, 32, 3, 4), np.uint8), "y": np.ones((4, 1), np.uint8)})
    with pytest.warns(DataWarning, match="is not read"):
        source = open_source(folder)
    assert (len(source.train), source.fingerprint) == (20, before)
    assert source.notes == (f"{folder / 'extra_32x32.mat'} is not read: the training split is train_32x32.mat",)


def test_refuses_arrays_that_do_not_fit_into_the_memory(tmp_path, svhn, monkeypatch):
    monkeypatch.setattr("kdfast.data.readers.archives.svhn.available_memory", lambda: 50_000)
    monkeypatch.setattr("scipy.io.loadmat", lambda *a, **k: pytest.fail("read"))
    with pytest.raises(DataError, match=r"it takes 0\.0 GB, and 0\.0 GB of memory are free"):
        open_source(svhn(tmp_path / "svhn"))
