import gzip
import json

import numpy as np
import pytest

from kdfast.data.readers.registry import open_source
from kdfast.errors import DataError


def values(split):
    return split.read(range(len(split)))[:, 0, 0, 0].tolist()


def samples(encode, labels, end="cls", start=0):
    """Return members: sample i has gray level start + i and a label."""
    members = []
    for index, label in enumerate(labels):
        pixels = np.full((16, 16, 3), start + index, np.uint8)
        members += [(f"{index:03}.png", encode(pixels)), (f"{index:03}.{end}", label.encode())]
    return members


def test_samples_are_in_the_order_of_shards_and_members(write, encode, tmp_path):
    for shard in range(11):
        write["tar"](tmp_path / "train" / f"{shard}.tar", samples(encode, ["0", "1"], start=10 * shard))
    write["tar"](tmp_path / "val" / "0.tar", samples(encode, ["1"], start=7))
    source = open_source(tmp_path)
    assert values(source.train) == [10 * shard + index for shard in range(11) for index in range(2)]  # 2 before 10
    assert source.train.labels.tolist() == [0, 1] * 11
    assert (values(source.test), source.classes, source.kind) == ([7], ("0", "1"), "shards")


@pytest.mark.parametrize(
    ("end", "labels", "classes"),
    [
        ("cls", ["1", "0\n", "1"], ("0", "1")),
        ("cls.txt", ["dog", "cat", "dog"], ("cat", "dog")),
        ("json", [json.dumps({"label": 1, "width": 3}), json.dumps({"cls": 0}), json.dumps({"label": 1})], ("0", "1")),
    ],
)
def test_reads_numbers_names_and_json(write, encode, tmp_path, end, labels, classes):
    path = write["tar"](tmp_path / "all.tar", samples(encode, [*labels, *labels], end))
    with pytest.warns(match="has no test split"):
        source = open_source(path, split=0.5)
    assert source.classes == classes
    gray = np.array(values(source.train) + values(source.test))
    expected = np.array([1, 0, 1, 1, 0, 1])[gray]
    assert np.concatenate([source.train.labels, source.test.labels]).tolist() == expected.tolist()


def test_class_names_lie_beside_the_shards(write, tmp_path):
    root = write["shards"](tmp_path)
    (root / "classnames.txt").write_text("ant\nbee\ncat\n")
    assert open_source(root).classes == ("ant", "bee", "cat")


def test_what_is_left_out_is_counted(write, encode, tmp_path):
    members = samples(encode, ["0", "1"])
    more = [("9.txt", b"a caption"), ("8.png", members[0][1]), ("._0.png", b"x"), ("7.cls", b"0"), ("6.cls", b"")]
    write["tar"](tmp_path / "train-0.tar", members + more)
    write["tar"](tmp_path / "test-0.tar", members)
    with pytest.warns(match=r"skipped 4 samples without an image and its class \(\.cls"):
        assert len(open_source(tmp_path).train) == 2


def test_images_are_read_where_they_are(write, tmp_path):
    source = open_source(write["shards"](tmp_path))
    order = np.random.default_rng(0).permutation(12)
    singly = np.concatenate([source.train.read([index]) for index in order])
    assert np.array_equal(source.train.read(order), singly)
    assert open_source(tmp_path, size=8).train.shape == (8, 8, 3)


def test_refuses_damage(write, encode, tmp_path):
    good = samples(encode, ["0", "1"])
    write["tar"](tmp_path / "test-0.tar", good)
    train = tmp_path / "train-0.tar"

    def refused(message):
        with pytest.raises(DataError, match=message):
            values(open_source(tmp_path).train)

    write["tar"](train, good)
    raw = train.read_bytes()
    train.write_bytes(raw[:700])
    refused(r"train-0\.tar (is damaged or a compressed archive|ends within a file)")
    train.write_bytes(gzip.compress(raw))
    refused(r"train-0\.tar is damaged or a compressed archive")
    write["tar"](train, good + good[:1])
    refused(r"holds 000\.png twice")
    write["tar"](train, [(name, b"x") for name, _ in good if name.endswith("png")])
    refused(r"has no sample with an image and its class")
    write["tar"](train, [(name, b"x" if name == "001.png" else content) for name, content in good])
    refused(r"train-0\.tar \(001\.png\) cannot be read as an image")
    write["tar"](train, [(name, b"{" if name.endswith("json") else c) for name, c in samples(encode, ["{}"], "json")])
    refused("cannot read the class of a sample")
    write["tar"](train, samples(encode, ["cat", "dog"]))
    write["tar"](tmp_path / "test-0.tar", samples(encode, ["cow"]))
    refused(r"\(test\) has the label 'cow', and the classes are cat, dog")
