import numpy as np
import pytest

from kdfast.data.readers.labels import find_classes, read_class_names
from kdfast.errors import DataError


@pytest.mark.parametrize(
    ("train", "declared", "names", "numbers"),
    [
        (["b", "a", "b"], None, ("a", "b"), [1, 0, 1]),
        (["1", "0", "1"], None, ("0", "1"), [1, 0, 1]),
        (["1", "0", "1"], ("cat", "dog"), ("cat", "dog"), [1, 0, 1]),
        (["7", "3", "7"], ("3", "7"), ("3", "7"), [1, 0, 1]),  # names that are numbers
        (["1", "x", "1"], None, ("1", "x"), [0, 1, 0]),
        (np.array([1, 0, 1]), ("cat", "dog"), ("cat", "dog"), [1, 0, 1]),
        (["12345678901", "1", "1"], None, ("1", "12345678901"), [1, 0, 0]),
    ],
)
def test_numbers_and_names(train, declared, names, numbers):
    classes = find_classes(train, declared, "d")
    assert classes.names == names
    assert classes.numbers(train, "d").tolist() == numbers


def test_test_labels_are_read_as_those_of_the_training_images():
    named = find_classes(["1", "x"], None, "d")
    assert named.numbers(["1", "1"], "t").tolist() == [0, 0]  # a name, not number one
    with pytest.raises(DataError, match="t has the label '0', and the classes are 1, x: correct it"):
        named.numbers(["0"], "t")
    with pytest.raises(DataError, match="t has the label 'cat', and the classes are 0, 1"):
        find_classes(["0", "1"], None, "d").numbers(["cat"], "t")
    with pytest.raises(DataError, match=r"and the classes are 0, 1, \.\.\., 19"):
        find_classes([str(i) for i in range(20)], None, "d").numbers(["20"], "t")


def test_numbers_must_have_no_gap():
    with pytest.raises(DataError, match="no training sample has label 1"):
        find_classes(["0", "2"], None, "d")


def test_names_lie_in_a_file(tmp_path):
    assert read_class_names(tmp_path) is None
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9 au lait\n\nth\xc3\xa9\n")
    assert read_class_names(tmp_path) == ("caf\udce9 au lait", "thé")
