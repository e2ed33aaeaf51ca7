import tarfile

import numpy as np
import pytest

from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError


def test_reads_columns_first_and_labels_from_one(write, tmp_path):
    root = write["stl10"](tmp_path / "stl10_binary")
    pixels = np.zeros((20, 3, 96, 96), np.uint8)
    pixels[4, 1, 7, 50] = 200  # of image 4 the green channel, column 7, row 50
    (root / "train_X.bin").write_bytes(pixels.tobytes())
    (root / "unlabeled_X.bin").write_bytes(b"")
    with pytest.warns(match=r"skipped unlabeled_X\.bin"):
        source = open_source(tmp_path)  # the parent
    image = source.train.read([4])[0]
    assert np.argwhere(image).tolist() == [[50, 7, 1]]
    assert source.train.labels.tolist() == [index % 10 for index in range(20)]
    assert (source.classes[0], source.classes[9], len(source.test)) == ("airplane", "truck", 10)
    assert (source.view_spec.kind, source.view_spec.flip) == ("crop", True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("test_y.bin", None, r"lacks test_y\.bin"),
        ("train_X.bin", b"x" * 27648, "has 27648 bytes for 20 labels, not 27648 each"),
        ("train_X.bin", b"x" * 7, "has 7 bytes for 20 labels"),
        ("train_y.bin", bytes(20), "has labels from 0 to 0, not 1 to 10"),
        ("train_y.bin", bytes([11] * 20), "has labels from 11 to 11"),
    ],
)
def test_refuses_damage(write, tmp_path, name, content, message):
    root = write["stl10"](tmp_path / "stl10_binary")
    (root / name).unlink()
    if content is not None:
        (root / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_source(root)


def test_the_archive_must_be_unpacked(tmp_path):
    with tarfile.open(tmp_path / "stl10_binary.tar.gz", "w:gz") as tar:
        tar.addfile(tarfile.TarInfo("stl10_binary/train_X.bin"))
    with pytest.raises(DataError, match="is packed: unpack it with tar -xzf"):
        open_source(tmp_path / "stl10_binary.tar.gz")
