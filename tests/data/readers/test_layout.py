import re
import shutil

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError, DataWarning


def write_image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value, 9, 9)).save(path)


def tiny_imagenet(root):
    """Write Tiny-ImageNet in small, as downloaded; the class of image i is i % 2."""
    for name in ("n01", "n02"):
        for number in range(3):
            write_image(root / "train" / name / "images" / f"{name}_{number}.JPEG")
        (root / "train" / name / f"{name}_boxes.txt").write_text("")
    lines = []
    for number in range(6):
        write_image(root / "val" / "images" / f"val_{number}.png", number * 20)
        write_image(root / "test" / "images" / f"test_{number}.JPEG")
        lines.append(f"val_{number}.png\tn0{1 + number % 2}\t0\t0\t62\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def opened(root, match="the test images are those of .*val"):
    with pytest.warns(DataWarning) as caught:
        source = open_source(root)
    assert any(re.search(match, str(warning.message)) for warning in caught)
    return source


def test_reads_tiny_imagenet_as_downloaded(tmp_path):
    root = tiny_imagenet(tmp_path)
    with pytest.warns(DataWarning) as caught:
        source = open_source(root)
    assert source.classes == ("n01", "n02")
    assert (len(source.train), source.test.labels.tolist()) == (6, [0, 0, 0, 1, 1, 1])
    assert source.test.read(range(6))[:, 0, 0, 0].tolist() == [0, 40, 80, 20, 60, 100]
    assert [str(warning.message).removeprefix(str(tmp_path)) for warning in caught] == [
        "/train: skipped 2 files without the suffix of an image: 2 .txt",
        f"/test has classes that train/ lacks: images; the test images are those of {root / 'val'}",
    ]


def test_sorted_and_annotated_splits_read_the_same(tmp_path):
    annotated = tiny_imagenet(tmp_path / "a")
    moved = tiny_imagenet(tmp_path / "b")
    for number in range(6):
        target = moved / "val" / f"n0{1 + number % 2}" / f"val_{number}.png"
        target.parent.mkdir(exist_ok=True)
        (moved / "val" / "images" / f"val_{number}.png").rename(target)
    (moved / "val" / "images").rmdir()
    first, second = (opened(root).test for root in (annotated, moved))
    assert np.array_equal(first.read(range(6)), second.read(range(6)))
    assert np.array_equal(first.labels, second.labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("n02", "n03", 1), "line 2: 'n03' is not a class"),
        (lambda text: text.replace("val_1.png", "val_9.png"), "names 1 images that .* lacks, such as val_9.png"),
        (lambda text: text + text.splitlines()[0], "line 7: val_0.png appears twice"),
        (lambda text: text.replace("\t", " "), "line 1: '' is not a class"),
        (lambda text: "", "is empty"),
    ],
)
def test_rejects_wrong_annotations(tmp_path, change, message):
    root = tiny_imagenet(tmp_path)
    table = root / "val" / "val_annotations.txt"
    table.write_text(change(table.read_text()))
    with pytest.raises(DataError, match=message):
        open_source(root)


def test_images_without_annotation_are_counted(tmp_path):
    root = tiny_imagenet(tmp_path)
    write_image(root / "val" / "images" / "other.png")
    assert len(opened(root, "skipped 1 images that val_annotations.txt does not name").test) == 6


def test_rejects_annotations_of_ambiguous_names(tmp_path):
    root = tiny_imagenet(tmp_path)
    write_image(root / "val" / "more" / "val_0.png")
    with pytest.raises(DataError, match="several images of one name"):
        open_source(root)


UNLABELED = {
    "flat": ("ILSVRC2012_test_1.png",),
    "one folder": ("images/1.png", "images/2.png"),
    "hidden": (".ipynb_checkpoints/1.png",),
    "other names": ("unknown/1.png",),
}


@pytest.mark.parametrize("kind", [*UNLABELED, "empty", "empty classes"])
def test_an_unlabeled_test_split_beside_a_good_val_is_skipped(tmp_path, image_folder, kind):
    root = image_folder(tmp_path, test="val")
    (root / "test").mkdir()
    for name in UNLABELED.get(kind, ()):
        write_image(root / "test" / name)
    if kind == "empty classes":
        (root / "test" / "ant").mkdir()
    source = opened(root)
    assert len(source.test) == 8
    assert source.fingerprint == open_source(image_folder(tmp_path / "other")).fingerprint


def test_a_labeled_test_split_is_preferred_and_checked(tmp_path, image_folder):
    root = image_folder(tmp_path, per_class=2)
    shutil.copytree(root / "test", root / "val")
    write_image(root / "val" / "ant" / "9.png")
    assert len(open_source(root).test) == 4
    (root / "test" / "wasp").mkdir()
    with pytest.raises(DataError, match=r"test has classes that train/ lacks: wasp; add or remove"):
        open_source(root)


@pytest.mark.parametrize("kind", ["missing", "empty", "annotated"])
def test_a_class_without_test_images_is_noted(tmp_path, image_folder, kind):
    root = image_folder(tmp_path, per_class=2, test="val" if kind == "annotated" else "test")
    assert not any("has no images of" in note for note in open_source(root).notes)
    if kind == "annotated":
        shutil.rmtree(root / "val")
        write_image(root / "val" / "images" / "1.png")
        (root / "val" / "val_annotations.txt").write_text("1.png\tbee\n")
    else:
        shutil.rmtree(root / "test" / "ant")
        if kind == "empty":
            (root / "test" / "ant").mkdir()
    with pytest.warns(DataWarning, match=r"has no images of 1 class of train/: ant"):
        assert set(open_source(root).test.labels) == {1}


def test_two_unlabeled_splits_are_an_error_that_names_both(tmp_path, image_folder):
    root = image_folder(tmp_path, test="other")
    write_image(root / "test" / "1.png")
    write_image(root / "val" / "images" / "1.png")
    with pytest.raises(DataError, match=r"test has no class folders; .*val has classes .*: images: store test images"):
        open_source(root)
