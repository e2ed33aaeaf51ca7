"""Image folders whose splits have other names, or whose test images lie in one folder beside a list of classes."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError, DataWarning


@pytest.mark.parametrize("train", ["train", "Train", "TRAIN", "training"])
@pytest.mark.parametrize("test", ["test", "Test", "val", "VAL", "valid", "validation", "Validation", "testing", "eval"])
def test_common_names_open_alike(tmp_path, image_folder, train, test):
    root = image_folder(tmp_path, test=test, per_class=1)
    (root / "train").rename(root / train)
    source = open_source(root)
    assert (source.kind, source.classes, len(source.train), len(source.test)) == ("folder", ("ant", "bee"), 2, 2)


def test_names_that_differ_only_in_case(tmp_path, image_folder):
    root = image_folder(tmp_path, test="Test", per_class=2)
    shutil.copytree(root / "Test", root / "test")
    (root / "test" / "ant" / "1.png").unlink()
    assert len(open_source(root).test) == 3  # lower case is preferred
    (root / "test").rename(root / "TEST")
    with pytest.raises(DataError, match="has TEST/ and Test/: remove or rename all but one"):
        open_source(root)


def test_the_earlier_name_wins(tmp_path, image_folder):
    root = image_folder(tmp_path, per_class=2)
    for name in ("val", "valid"):
        shutil.copytree(root / "test", root / name)
        (root / name / "bee" / "1.png").unlink()
    assert len(open_source(root).test) == 4


def test_neither_train_nor_test_is_one_line(tmp_path, image_folder):
    root = image_folder(tmp_path, per_class=1)
    (root / "train").rename(root / "other")
    with pytest.raises(DataError, match=r"\(other, test\) is not a known data source: pass one of: .*train/<class>/"):
        open_source(root)


def flat(root, names=("n01", "n02"), count=4, suffix=".JPEG", folder="val"):
    """Write train/ by class and test images in one folder; image i has gray level 20 * i."""
    for name in names:
        (root / "train" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(root / "train" / name / "0.png")
    (root / folder).mkdir()
    for number in range(count):
        Image.new("RGB", (16, 16), (20 * number,) * 3).save(root / folder / f"v_{number}{suffix}", format="PNG")
    return root


LISTS = {
    "names beside it": ("val.txt", "v_{i}.JPEG {name}\n", ""),
    "paths": ("val.txt", "val/v_{i}.JPEG\t{name}\n", ""),
    "numbers": ("val_list.txt", "v_{i}.JPEG {number}\n", ""),
    "inside": ("val/val_labels.csv", "v_{i}.JPEG,{name}\n", "filename,label\n"),
    "other name": ("val/labels.txt", "v_{i}.JPEG {name}\n", ""),
    "Kaggle": ("LOC_val_solution.csv", "v_{i},{name} 85 1 499 272 {name} 1 1 2 2\n", "ImageId,PredictionString\n"),
    "tab": ("val/val_annotations.txt", "v_{i}.JPEG\t{name}\t0\t0\t62\t62\n", ""),
}


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.filterwarnings("ignore:.*numbers the classes", "ignore:.*skipped 1 file without the suffix")
def test_a_flat_test_split_with_a_list(tmp_path, kind):
    root = flat(tmp_path)
    name, line, head = LISTS[kind]
    lines = [line.format(i=i, name=f"n0{1 + i % 2}", number=i % 2) for i in (3, 0, 1, 2)]
    (root / name).write_text(head + "".join(lines))
    source = open_source(root)
    assert source.test.labels.tolist() == [0, 0, 1, 1]
    assert source.test.read(range(4))[:, 0, 0, 0].tolist() == [0, 40, 20, 60]


def test_numbers_are_positions_and_said_so(tmp_path):
    root = flat(tmp_path)
    (root / "val.txt").write_text("v_0.JPEG 0\nv_1.JPEG 1\nv_2.JPEG 1\nv_3.JPEG 0\n")
    with pytest.warns(DataWarning, match="numbers the classes, in the order of their sorted names: 0 is n01, 1 is n02"):
        assert open_source(root).test.labels.tolist() == [0, 0, 1, 1]
    (root / "val.txt").write_text("v_0.JPEG 1\nv_1.JPEG 2\nv_2.JPEG 1\nv_3.JPEG 2\n")
    with pytest.raises(DataError, match="numbers the classes from 1 to 2, and train/ has 2: number them 0 to 1"):
        open_source(root)


def test_a_dummy_class_for_all_is_no_list(tmp_path):
    root = flat(tmp_path, folder="test")
    (root / "test.txt").write_text("".join(f"v_{i}.JPEG 0\n" for i in range(4)))
    with pytest.raises(DataError, match="has no class folders"):
        open_source(root)


def test_a_list_beside_an_unlabeled_test_does_not_hide_a_good_val(tmp_path, image_folder):
    root = image_folder(tmp_path, test="val", per_class=2)
    (root / "test").mkdir()
    for number in range(2):
        Image.new("RGB", (16, 16)).save(root / "test" / f"{number}.png")
    (root / "test.txt").write_text("0.png ant\n1.png bee\n")
    with pytest.warns(DataWarning, match="the test images are those of .*val"):
        assert len(open_source(root).test) == 4


def test_two_lists_are_refused(tmp_path):
    root = flat(tmp_path)
    for name in ("val.txt", "val.csv"):
        (root / name).write_text("v_0.JPEG,n01\n" if name.endswith("csv") else "v_0.JPEG n01\n")
    with pytest.raises(DataError, match=r"both list the classes of the images in .*val: remove or rename one"):
        open_source(root)


@pytest.mark.parametrize("place", ["class", "split", "names"])
def test_names_that_are_not_utf_8(tmp_path, place):
    root = os.fsencode(tmp_path)
    names = [b"caf\xe9", b"th\xe9"]
    for part in (b"train", b"val"):
        for label, name in enumerate(names):
            folder = root + b"/" + part + (b"" if (place, part) == ("names", b"val") else b"/" + name)
            os.makedirs(folder, exist_ok=True)
            Image.new("RGB", (16, 16), (100 * label,) * 3).save(os.fsdecode(folder + b"/%d\xe8.png" % label))
    if place == "names":
        with open(root + b"/val/val_annotations.txt", "wb") as file:
            file.write(b"0\xe8.png\tcaf\xe9\n1\xe8.png\tth\xe9\n")
    source = open_source(os.fsdecode(root))
    assert [os.fsencode(name) for name in source.classes] == names
    assert source.test.read([0, 1])[:, 0, 0, 0].tolist() == [0, 100]
    assert len(source.fingerprint) == 64


def test_class_folders_alone(write, tmp_path):
    root = write["classes"](tmp_path / "d", classes=("b", "a", "c"), per_class=3)
    with pytest.warns(DataWarning, match="has no test split: 3 of 9"):
        source = open_source(root, split=0.3)
    assert source.classes == ("a", "b", "c")
    assert np.bincount(source.test.labels).tolist() == [1, 1, 1]
    shutil.rmtree(root / "b")
    shutil.rmtree(root / "c")
    with pytest.raises(DataError, match="is not a known data source"):
        open_source(root, split=0.3)


@pytest.mark.parametrize("kind", ["folder", "classes"])
@pytest.mark.filterwarnings("ignore:.*has no test split")
def test_links_to_themselves_are_no_splits(write, tmp_path, kind):
    root = write[kind](tmp_path / "d")
    for name in ("val", "loop"):
        (root / name).symlink_to(name)
    assert open_source(root, split=0.25 if kind == "classes" else None).kind == kind


@pytest.mark.parametrize("linked", ["split", "class", "root"])
def test_links_to_folders_are_followed(write, tmp_path, linked):
    root = write["folder"](tmp_path / "d")
    expected = open_source(root).fingerprint
    place = {"split": root / "train", "class": root / "train" / "bee", "root": root}[linked]
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    assert open_source(root).fingerprint == expected
