import os

import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError, DataWarning


def image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value, value, value)).save(path)


def values(split):
    return split.read(range(len(split)))[:, 0, 0, 0].tolist()


@pytest.fixture
def images(tmp_path):
    """Write images/0.png to images/5.png, whose gray level is ten times their number."""
    for number in range(6):
        image(tmp_path / "images" / f"{number}.png", 10 * number)
    return tmp_path


def test_samples_are_in_the_order_of_the_list(images):
    (images / "train.txt").write_text("3.png dog\n0.png cat\n\n2.png dog\n")
    (images / "val.txt").write_text("images/1.png\tcat\n")
    source = open_source(images)
    assert (source.kind, source.classes) == ("list", ("cat", "dog"))
    assert (values(source.train), source.train.labels.tolist()) == ([30, 0, 20], [1, 0, 1])
    assert (values(source.test), source.test.labels.tolist()) == ([10], [0])
    assert source.view_spec.flip


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.txt", "0.png 0\n1.png 1\n"),
        ("Train_List.txt", "images/0.png 0\nimages/1.png 1\n"),
        ("train.lst", "0 0\n1 1\n".replace("0 ", "0.png ").replace("1 1", "1.png 1")),
        ("train.tsv", "0.png\t0\tx\n1.png\t1\ty\n"),
        ("train.csv", "0.png,0\n1.png,1\n"),
        ("train.csv", "label,split,filename\n0,a,0.png\n1,b,1.png\n"),
        ("train.csv", 'id,label\n0,0\n"1",1\n'),  # without the suffix
        ("training_labels.csv", "image,class\n0.png,0\n1.png,1\n"),
    ],
)
def test_reads_the_usual_tables(images, name, text):
    (images / name).write_text(text)
    (images / "test.csv").write_text("2.png,1\n")
    source = open_source(images)
    assert (values(source.train), source.train.labels.tolist(), values(source.test)) == ([0, 10], [0, 1], [20])
    assert source.classes == ("0", "1")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("train.csv", "0.png,gray wolf\n1.png,gray seal\n"),
        ("train.csv", '\ufefffilename,label\r\n0.png,gray wolf\r\n1.png,"gray seal"\r\n'),
        ("train.txt", "0.png\tgray wolf\n1.png\tgray seal\n"),
        ("train.tsv", "0.png\tgray wolf\n1.png\tgray seal\n"),
    ],
)
def test_names_of_classes_may_contain_blanks(images, name, text):
    (images / name).write_text(text)
    (images / "test.csv").write_text("2.png,gray wolf\n")
    source = open_source(images)
    assert source.classes == ("gray seal", "gray wolf")
    assert (source.train.labels.tolist(), source.test.labels.tolist()) == ([1, 0], [1])


def test_a_list_beside_images_in_one_folder(images):
    """As Kaggle publishes data: `train.csv`, the images in `train/`, and those of the challenge in `test/`."""
    (images / "images").rename(images / "train")
    image(images / "test" / "a.png", 0)
    (images / "train.csv").write_text("id,label\n" + "".join(f"{i},{i % 2}\n" for i in range(6)))
    with pytest.warns(DataWarning, match="2 of 6 training images"):
        source = open_source(images, split=0.3)
    assert source.kind == "list"
    assert sorted(values(source.train) + values(source.test)) == [0, 10, 20, 30, 40, 50]
    with pytest.raises(DataError, match=r"has no test split .*`split`"):
        open_source(images)


def test_paths_are_found_beside_below_and_above_the_list(tmp_path):
    for folder in ("train", "lists", "."):
        root = tmp_path / folder.strip(".") / "case"
        image(root / "train" / "n1" / "a b.png", 10)
        image(root / "train" / "n2" / "c.png", 20)
        (root / "val").mkdir()
        image(root / "val" / "d.png", 30)
        (root / "lists").mkdir()
        lists = root / "lists" if folder == "lists" else root
        prefix = "train/" if folder == "lists" else ""
        (lists / "train.txt").write_text(f"{prefix}n1/a b.png 0\n{prefix}n2/c.png 1\n")
        (lists / "val.txt").write_text(f"{'val/' if folder == 'lists' else ''}d.png 1\n")
        if folder == "lists":
            source = open_source(lists)
            assert (values(source.train), values(source.test)) == ([10, 20], [30])


def test_absolute_paths_and_names_that_are_not_utf_8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    for number in range(2):
        Image.new("RGB", (16, 16), (10 * number,) * 3).save(os.fsdecode(folder) + f"/{number}.png")
    lines = b"".join(folder + b"/%d.png caf\xe9%d\n" % (number, number) for number in range(2))
    (tmp_path / "train.txt").write_bytes(lines)
    (tmp_path / "test.txt").write_bytes(lines)
    source = open_source(tmp_path)
    assert values(source.train) == [0, 10]
    assert [os.fsencode(name) for name in source.classes] == [b"caf\xe90", b"caf\xe91"]


def test_one_list_is_divided_and_classes_are_named(images):
    (images / "all.txt").write_text("".join(f"{number}.png {number % 2}\n" for number in range(6)))
    (images / "classes.txt").write_text("cat\ndog\n")
    with pytest.warns(match="0.34 of every class"):
        source = open_source(images / "all.txt", split=0.34)
    assert source.classes == ("cat", "dog")
    assert sorted(values(source.train) + values(source.test)) == [0, 10, 20, 30, 40, 50]
    assert np.array_equal(np.array(values(source.test)) // 10 % 2, source.test.labels)


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("0.png\n1.png 1\n", r"line 1: '0\.png' has no class: write `path label`"),
        ("0.png 0\n0.png 1\n", r"line 2: 0\.png appears twice"),
        ("0.png 0\n9.png 1\n", r"names 1 images that are not in .*images, such as 9\.png in line 2"),
        ("7.png 0\n9.png 1\n", r"line 1: there is no image 7\.png \(looked in .*\): correct the path"),
        ("0.png 0\n1.png 2\n", "no training sample has label 1"),
        ("0.png 0\n1.png 99999999\n", "no training sample has label 1"),
    ],
)
def test_refuses_wrong_lists(images, train, message):
    (images / "train.txt").write_text(train)
    (images / "test.txt").write_text("2.png 0\n")
    with pytest.raises(DataError, match=message):
        open_source(images)


def test_refuses_a_class_that_only_the_test_list_has(images):
    (images / "train.txt").write_text("0.png cat\n1.png dog\n")
    (images / "test.txt").write_text("2.png cow\n")
    with pytest.raises(DataError, match=r"test\.txt has the label 'cow', and the classes are cat, dog: correct it"):
        open_source(images)


def test_other_text_files_are_no_lists(tmp_path):
    (tmp_path / "train.txt").write_text("these are my notes about 0.png\n")
    with pytest.raises(DataError, match=r"not a known data source.*a list of images"):
        open_source(tmp_path)
