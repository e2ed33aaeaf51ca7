import gzip
import shutil

import numpy as np
import pytest

from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError


def test_plain_and_packed_files_hold_the_same(write, tmp_path):
    plain = open_source(write["idx"](tmp_path / "plain", packed=()))
    packed = open_source(write["idx"](tmp_path / "packed", packed=("train", "t10k")))
    assert plain.fingerprint == packed.fingerprint
    assert (plain.kind, len(plain.train), len(plain.test)) == ("idx", 30, 10)
    assert plain.classes == tuple("0123456789")
    raw = (tmp_path / "plain" / "train-images-idx3-ubyte").read_bytes()
    first = np.frombuffer(raw[16 : 16 + 784], np.uint8).reshape(28, 28)
    assert np.array_equal(plain.train.read([0])[0], np.stack([first] * 3, -1))
    assert (plain.view_spec.kind, plain.view_spec.pad, plain.view_spec.flip) == ("shift", 3, False)


@pytest.mark.parametrize("place", ["raw", "FashionMNIST/raw"])
def test_finds_the_files_where_torchvision_puts_them(write, tmp_path, place):
    write["idx"](tmp_path / place)
    assert len(open_source(tmp_path).train) == 30


def test_dots_in_names_and_a_prefix(write, tmp_path):
    root = write["idx"](tmp_path / "a", packed=())
    for file in list(root.iterdir()):
        file.rename(root / ("emnist-balanced-" + file.name.replace("t10k", "test").replace("-idx", ".idx")))
    assert len(open_source(root).test) == 10


def test_two_data_sets_are_refused_by_name(write, tmp_path):
    for name in ("MNIST", "KMNIST"):
        write["idx"](tmp_path / name / "raw")
    with pytest.raises(DataError, match=r"several data sets .*KMNIST.*MNIST.*: pass a folder with the files of"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train-labels-idx1-ubyte", None, "lacks the train labels: it needs train-images"),
        ("train-images-idx3-ubyte", lambda raw: raw[:-1], "declares 23520 values and holds fewer"),
        ("train-images-idx3-ubyte", lambda raw: raw + b"x", "declares 23520 values and holds more"),
        ("train-images-idx3-ubyte", lambda raw: raw[:7], "does not start like an idx file of 3 dimensions"),
        ("train-labels-idx1-ubyte", lambda raw: b"\0\0\x0d\1" + raw[4:], "does not start like an idx file of 1 dim"),
        ("train-labels-idx1-ubyte", lambda raw: raw[:4] + b"\xff\xff\xff\xff" + raw[8:], "GB|fewer"),
        ("t10k-images-idx3-ubyte.gz", lambda raw: raw[:-9], "is damaged or no idx file"),
        ("t10k-images-idx3-ubyte.gz", lambda raw: b"no gzip", "is damaged or no idx file"),
        ("t10k-labels-idx1-ubyte.gz", lambda raw: gzip.compress(b"\0\0\x08\1\0\0\0\1\0"), "one integer per image"),
    ],
)
def test_refuses_damage(write, tmp_path, name, change, message):
    root = write["idx"](tmp_path / "a")
    raw = (root / name).read_bytes()
    (root / name).unlink()
    if change is not None:
        (root / name).write_bytes(change(raw))
    with pytest.raises(DataError, match=message):
        open_source(root)
    shutil.rmtree(root)
