import os

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.folders.image_split import ImageSplit
from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError, DataWarning


def test_order_is_sorted_by_class_then_path(tmp_path, image_folder):
    root = image_folder(tmp_path, classes=("b", "a", "B"), per_class=3)
    source = open_source(root)
    assert source.classes == ("B", "a", "b")
    assert source.train.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert np.array_equal(source.train.read([4])[0], np.asarray(Image.open(root / "train" / "a" / "1.png")))


def test_val_is_used_without_test(tmp_path, image_folder):
    assert len(open_source(image_folder(tmp_path, test="val")).test) == 8


def test_reads_nested_images_and_skips_other_files(tmp_path, image_folder):
    root = image_folder(tmp_path, per_class=2)
    (root / "train" / "ant" / "deep").mkdir()
    Image.new("RGB", (16, 16)).save(root / "train" / "ant" / "deep" / "x.PNG")
    (root / "train" / "ant" / ".hidden.png").write_bytes(b"")
    (root / "train" / "ant" / "notes.txt").write_text("no image")
    (root / "train" / ".cache").mkdir()
    with pytest.warns(DataWarning) as caught:
        assert len(open_source(root).train) == 5
    assert [str(warning.message).partition(": ")[2] for warning in caught] == [
        "skipped 1 file without the suffix of an image: 1 .txt",
        f"skipped 1 image in hidden files and folders, such as {root}/train/ant/.hidden.png",
    ]


def test_threads_read_the_same_pixels(tmp_path, image_folder):
    source = open_source(image_folder(tmp_path, per_class=20))
    order = np.random.default_rng(0).permutation(40)
    singly = np.concatenate([source.train.read([index]) for index in order])
    assert np.array_equal(source.train.read(order), singly)


def test_size_scales_the_shorter_side_and_crops_the_center(tmp_path, image_folder):
    root = image_folder(tmp_path, sizes=[(30, 20), (20, 50), (20, 20)])
    source = open_source(root, size=20)
    assert source.train.shape == (20, 20, 3)
    tall = np.asarray(Image.open(root / "train" / "ant" / "0.png"))
    assert np.array_equal(source.train.read([0])[0], tall[5:25])
    wide = np.asarray(Image.open(root / "train" / "ant" / "1.png"))
    assert np.array_equal(source.train.read([1])[0], wide[:, 15:35])
    assert open_source(root, size=7).test.read(range(8)).shape == (8, 7, 7, 3)


def test_rejects_mixed_sizes_without_size(tmp_path, image_folder):
    with pytest.raises(DataError, match="set `size`"):
        open_source(image_folder(tmp_path, sizes=[(16, 16), (16, 20)]))


def test_reading_rejects_a_size_that_opening_did_not_check(tmp_path, image_folder, monkeypatch):
    monkeypatch.setattr("kdfast.data.readers.folders.image_split._CHECKED_AT_OPENING", 2)
    root = image_folder(tmp_path, per_class=5)
    Image.new("RGB", (9, 9)).save(root / "train" / "ant" / "2.png")
    source = open_source(root)
    with pytest.raises(DataError, match=r"2\.png is 9x9, other images are 16x16"):
        source.train.read(range(10))


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_modes_become_rgb(tmp_path, image_folder, mode):
    root = image_folder(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).convert(mode)
    file = root / "train" / "ant" / "0.tif"
    image.save(file)
    source = open_source(root)
    place = sorted(os.listdir(file.parent)).index("0.tif")
    assert np.array_equal(source.train.read([place])[0], np.asarray(image.convert("RGB")))


def test_ignores_the_transparency_of_a_palette(tmp_path, image_folder):
    root = image_folder(tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).convert("P")
    image.save(root / "train" / "ant" / "0.png", transparency=bytes(range(256)))
    assert np.array_equal(open_source(root).train.read([0])[0], np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("limit", [150, 50])  # PIL warns above the limit and raises above twice the limit
@pytest.mark.parametrize("when", ["opening", "reading"])
def test_message_names_an_image_of_too_many_pixels(tmp_path, image_folder, monkeypatch, limit, when):
    root = image_folder(tmp_path)
    source = open_source(root)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DataError, match=r"0\.png cannot be read as an image.*exceeds? (the )?limit"):
        _ = open_source(root) if when == "opening" else source.train.read([0])


def test_stray_files_do_not_make_an_archive(tmp_path, image_folder):
    root = image_folder(tmp_path)
    for name in ("meta", "data.json"):
        (root / name).write_text("{}")
    assert open_source(root).kind == "folder"


def test_rejects_sixteen_bits(tmp_path, image_folder):
    root = image_folder(tmp_path)
    Image.fromarray(np.zeros((16, 16), np.uint16)).save(root / "train" / "ant" / "0.png")
    with pytest.raises(DataError, match=r"0\.png cannot be read.*8 bits"):
        open_source(root)


@pytest.mark.parametrize("cut", [0, 20, 300])
def test_truncated_image_is_named(tmp_path, image_folder, cut):
    root = image_folder(tmp_path, per_class=10)
    file = root / "train" / "bee" / "3.png"
    file.write_bytes(file.read_bytes()[:cut])

    def use():
        source = open_source(root)
        source.train.read(range(20))

    with pytest.raises(DataError, match=r"3\.png cannot be read as an image"):
        use()


def test_rejects_wrong_structures(tmp_path, image_folder):
    root = image_folder(tmp_path / "no test", test="other")
    with pytest.raises(DataError, match=r"no test split \(looked for test/, val/, valid/.*`split`, such as 0.1"):
        open_source(root)
    root = image_folder(tmp_path / "empty class")
    (root / "train" / "wasp").mkdir()
    with pytest.raises(DataError, match="wasp has no images"):
        open_source(root)
    root = image_folder(tmp_path / "unknown class")
    (root / "test" / "wasp").mkdir()
    with pytest.raises(DataError, match="lacks: wasp"):
        open_source(root)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "test").mkdir()
    with pytest.raises(DataError, match="no class folders"):
        open_source(tmp_path / "flat")


def test_rejects_a_file_removed_after_opening(tmp_path, image_folder):
    root = image_folder(tmp_path)
    source = open_source(root)
    (root / "train" / "ant" / "1.png").unlink()
    with pytest.raises(DataError, match=r"1\.png"):
        source.train.read([1])


def test_view_spec_depends_on_the_size(tmp_path, image_folder):
    small = open_source(image_folder(tmp_path / "small", side=32)).view_spec
    assert (small.kind, small.pad, small.flip) == ("shift", 4, True)
    large = open_source(image_folder(tmp_path / "large", side=64)).view_spec
    assert (large.kind, large.size, large.flip) == ("crop", (64, 64), True)


def test_rejects_an_empty_split():
    with pytest.raises(DataError, match="no image files"):
        ImageSplit([], np.zeros(0, np.int64), None)
