import numpy as np
import pytest
from PIL import Image

from kdfast.data.readers.registry import open_source
from kdfast.data.readers.split import SplitRule, divide, parse_split
from kdfast.data.subset import read_subset
from kdfast.errors import DataError, DataWarning, SubsetError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::kdfast.errors.DataWarning")


def without_test(write, tmp_path, kind):
    """Write data of a kind without a test split."""
    if kind == "npz":
        return write["npz"](tmp_path / "a.npz", test_images=None, test_labels=None)
    if kind == "classes":
        return write["classes"](tmp_path / "classes")
    if kind == "list":
        return write["list"](tmp_path / "lists") / "train.txt"
    if kind == "shards":
        root = write["shards"](tmp_path / "shards")
        (root / "test-000000.tar").unlink()
        return root
    if kind == "table":
        return write["table"](tmp_path / "table", splits=("train",))
    return write["folder"](tmp_path / "images", test="other")


KINDS = ("folder", "classes", "list", "shards", "table", "npz")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_without_a_test_split_needs_and_takes_a_share(write, tmp_path, kind):
    path = without_test(write, tmp_path, kind)
    with pytest.raises(DataError, match=r"no test split \(looked for .*\): add one, or .*`split`, such as 0.1"):
        open_source(path)
    with pytest.warns(DataWarning, match=r"has no test split: \d+ of \d+ training images, 0.25 of every class"):
        source = open_source(path, split=0.25)
    pixels = [split.read(range(len(split))).reshape(len(split), -1) for split in (source.train, source.test)]
    assert len(np.unique(np.concatenate(pixels), axis=0)) == sum(map(len, pixels))  # disjoint
    assert set(source.test.labels) == set(source.train.labels) == set(range(len(source.classes)))


@pytest.mark.parametrize("kind", KINDS)
def test_data_with_a_test_split_refuses_a_share(write, tmp_path, kind):
    path = write["npz"](tmp_path / "a.npz") if kind == "npz" else tmp_path
    if kind in ("folder", "list", "shards", "table"):
        path = write[kind](tmp_path / kind)
    elif kind == "classes":
        path = "digits"
    with pytest.raises(UsageError, match=r"`split` is 0\.1, but .* has a test split of its own: omit it"):
        open_source(path, split=0.1)


def test_every_class_gives_its_share():
    labels = np.repeat(np.arange(4), (1, 2, 30, 45))
    for seed in range(5):
        kept, taken = divide(labels, SplitRule(0.1, seed))
        assert np.bincount(labels[taken], minlength=4).tolist() == [0, 1, 3, 5]  # 4.5 rounds up
        assert sorted([*kept, *taken]) == list(range(78))
        assert (np.diff(kept) > 0).all()
        assert (np.diff(taken) > 0).all()


def test_the_share_depends_on_the_seed_only():
    labels = np.random.default_rng(0).integers(0, 5, 500)
    first = divide(labels, SplitRule(0.2))[1]
    assert np.array_equal(first, divide(labels.copy(), SplitRule(0.2, 0))[1])
    assert not np.array_equal(first, divide(labels, SplitRule(0.2, 1))[1])
    assert divide(np.zeros(10, np.int64), SplitRule(0.3))[1].tolist() == PINNED


PINNED = [2, 4, 6]


def test_splits_of_other_seeds_are_other_data(write, tmp_path):
    path = write["classes"](tmp_path / "d", per_class=8)
    sources = [open_source(path, split=rule) for rule in (0.25, "0.25:1", "0.25:0")]
    assert sources[0].fingerprint == sources[2].fingerprint != sources[1].fingerprint
    np.save(tmp_path / "ids.npy", np.arange(12))
    assert len(read_subset(tmp_path / "ids.npy", n=len(sources[0].train)).ids) == 12
    np.save(tmp_path / "far.npy", np.arange(16))  # ids of the whole folder
    with pytest.raises(SubsetError):
        read_subset(tmp_path / "far.npy", n=len(sources[0].train))


def test_an_unlabeled_test_folder_does_not_stand_in_the_way(write, tmp_path):
    root = write["folder"](tmp_path, test="other")
    (root / "test").mkdir()
    Image.new("RGB", (16, 16)).save(root / "test" / "1.png")
    with pytest.raises(DataError, match=r"no class folders: store test images as .*/test/<class>.*or .*`split`"):
        open_source(root)
    with pytest.warns(DataWarning, match="has no class folders"):
        assert len(open_source(root, split=0.25).test) == 2


def test_refuses_classes_of_one_image():
    with pytest.raises(DataError, match="every class has a single image"):
        divide(np.arange(5), SplitRule(0.5))


@pytest.mark.parametrize("value", ["", "x", "0", 1, 1.5, "-0.1", "nan", "inf", "0.1:", "0.1:-1", "0.1:x", "0.1:1:2"])
def test_refuses_other_values(value):
    with pytest.raises(UsageError, match=r"`split` is .*: pass the share of the test split, above 0 and below 1"):
        parse_split(value)


def test_reads_share_and_seed():
    assert parse_split(None) is None
    assert parse_split(0.1) == parse_split("0.1") == SplitRule(0.1, 0)
    assert parse_split("0.25:7") == SplitRule(0.25, 7)
