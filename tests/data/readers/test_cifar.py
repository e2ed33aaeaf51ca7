import os
import pickle
import struct
import tarfile

import numpy as np
import pytest

from kdfast.data.readers.archives.cifar import CIFAR10
from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError


def python2_pickle(data, labels):
    """Return the bytes that Python 2 and its numpy wrote, as in the official archives."""
    text = lambda word: b"U" + bytes([len(word)]) + word  # noqa: E731
    number = lambda value: b"M" + struct.pack("<H", value)  # noqa: E731
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\0K\1\x87R(K\3"
        + text(b"|")
        + b"NNN"
        + 2 * b"J\xff\xff\xff\xff"
        + b"K\0tb"
    )
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\0\x85" + text(b"b") + b"\x87R"
    state = b"(K\1" + number(data.shape[0]) + number(data.shape[1]) + b"\x86" + dtype + b"\x89T"
    state += struct.pack("<I", data.nbytes) + data.tobytes() + b"tb"
    listed = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\2}(" + text(b"data") + array + state + text(b"labels") + listed + b"u."


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_pixels_and_labels_match_the_file(tmp_path, cifar, kind, protocol):
    folder = cifar(tmp_path, kind, protocol)
    source = open_source(folder)
    first = pickle.loads((folder / ("data_batch_1" if kind == "cifar10" else "train")).read_bytes())
    assert source.kind == kind
    assert source.classes[:2] == ("class 0", "class 1")
    planes = source.train.read(range(20)).transpose(0, 3, 1, 2).reshape(20, 3072)
    assert np.array_equal(planes, first[b"data"])
    assert source.train.labels[:20].tolist() == [index % len(source.classes) for index in range(20)]
    assert (source.view_spec.kind, source.view_spec.pad, source.view_spec.flip, source.view_spec.count) == (
        "shift",
        4,
        True,
        162,
    )


def test_files_are_concatenated_in_order(tmp_path, cifar):
    folder = cifar(tmp_path, "cifar10")
    images = open_source(folder).train.read(range(100))
    for number in range(5):
        data = pickle.loads((folder / f"data_batch_{number + 1}").read_bytes())[b"data"]
        assert np.array_equal(images[20 * number][..., 0], data[0, :1024].reshape(32, 32))


def test_reads_a_python2_pickle(tmp_path, cifar):
    folder = cifar(tmp_path, "cifar10")
    data = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)
    raw = python2_pickle(data, range(7))
    assert np.array_equal(pickle.loads(raw, encoding="bytes")[b"data"], data)
    (folder / "test_batch").write_bytes(raw)
    test = open_source(folder).test
    assert np.array_equal(test.read(range(7)).transpose(0, 3, 1, 2).reshape(7, 3072), data)
    assert test.labels.tolist() == list(range(7))


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_outer_folder_and_tar_have_the_same_fingerprint(tmp_path, cifar, kind):
    folder = cifar(tmp_path / "outer", kind)
    archive = tmp_path / "renamed.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    prints = {open_source(path).fingerprint for path in (folder, folder.parent, archive)}
    assert len(prints) == 1


def test_reads_a_tar_of_the_current_folder(tmp_path, cifar):
    folder = cifar(tmp_path / "outer", "cifar10")
    archive = tmp_path / "dot.tar"
    with tarfile.open(archive, "w") as tar:
        tar.add(folder.parent, "./", recursive=False)
        tar.add(folder, f"./{folder.name}")
    with tarfile.open(archive) as tar:
        assert tar.next().name == "."
    assert open_source(archive).fingerprint == open_source(folder).fingerprint


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_recognizes_a_renamed_folder(tmp_path, cifar, kind):
    folder = cifar(tmp_path, kind).rename(tmp_path / "renamed")
    assert open_source(folder).kind == kind
    (folder / "batches.meta" if kind == "cifar10" else folder / "meta").unlink()
    with pytest.raises(DataError, match="meta: unpack"):
        open_source(folder)


def test_detects_a_flipped_bit_in_a_tar(tmp_path, cifar):
    folder = cifar(tmp_path, "cifar10")
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    raw = bytearray(archive.read_bytes())
    raw[len(raw) // 2] ^= 1
    archive.write_bytes(raw)
    with pytest.raises(DataError, match=r"cifar\.tar\.gz.*download it again"):
        open_source(archive)


@pytest.mark.parametrize("cut", [0, 10, 1000, -5])
def test_rejects_a_truncated_tar(tmp_path, cifar, cut):
    folder = cifar(tmp_path, "cifar10")
    archive = tmp_path / "cifar.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, folder.name)
    archive.write_bytes(archive.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"cifar\.tar\.gz.*download it again"):
        open_source(archive)


@pytest.mark.parametrize("name", CIFAR10.files)
def test_missing_file_is_named(tmp_path, cifar, name):
    folder = cifar(tmp_path, "cifar10")
    (folder / name).unlink()
    with pytest.raises(DataError, match=f"lacks {name}: unpack"):
        open_source(folder)


@pytest.mark.parametrize("size", [0, 1, 100, 5000, -1])
def test_truncated_file_is_named(tmp_path, cifar, size):
    folder = cifar(tmp_path, "cifar10")
    file = folder / "data_batch_3"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(DataError, match="data_batch_3 is damaged"):
        open_source(folder)


class Touch:
    """Creates a folder if an unsafe reader unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("file", ["data_batch_2", "batches.meta"])
def test_malicious_pickle_runs_nothing(tmp_path, cifar, file):
    folder = cifar(tmp_path, "cifar10")
    created = tmp_path / "created"
    (folder / file).write_bytes(pickle.dumps({b"data": Touch(created), b"labels": [0]}, 2))
    with pytest.raises(DataError, match=rf"{file}.*mkdir, which is code"):
        open_source(folder)
    assert not created.exists()


@pytest.mark.parametrize("target", ["builtins eval", "numpy load", "numpy.core.multiarray fromfile", "os system"])
def test_rejects_every_other_name(tmp_path, cifar, target):
    module, name = target.split()
    folder = cifar(tmp_path, "cifar10")
    (folder / "test_batch").write_bytes(b"\x80\2c" + f"{module}\n{name}\n".encode() + b"X\1\0\0\0x\x85R.")
    with pytest.raises(DataError, match=rf"{module}\.{name}, which is code"):
        open_source(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "not a dictionary"),
        ({b"labels": [0]}, "no uint8 array"),
        ({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}, "no uint8 array"),
        ({b"data": np.zeros((2, 3071), np.uint8), b"labels": [0, 1]}, "no uint8 array"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}, "one integer per image"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1.5]}, "one integer per image"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [[0], [1, 2]]}, "bad 'labels'"),
        ({b"data": np.zeros((2, 3072), np.uint8)}, "one integer per image"),
        ({b"data": np.array([None, 3], object), b"labels": [0, 1]}, "is damaged"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 10]}, "from 0 to 10, but there are 10 classes"),
        ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, -1]}, "from -1 to 0"),
    ],
)
def test_rejects_wrong_content(tmp_path, cifar, content, message):
    folder = cifar(tmp_path, "cifar10")
    (folder / "test_batch").write_bytes(pickle.dumps(content, 2))
    with pytest.raises(DataError, match=message):
        open_source(folder)


def test_rejects_both_archives_in_one_folder(tmp_path, cifar):
    cifar(tmp_path, "cifar10")
    cifar(tmp_path, "cifar100")
    with pytest.raises(DataError, match=r"several kinds \(cifar10, cifar100\)"):
        open_source(tmp_path)
