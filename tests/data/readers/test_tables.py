import json
import sys
import warnings

import numpy as np
import pytest

from kdfast.data.readers.registry import open_source
from kdfast.errors import BackendUnavailable, DataError


def values(split):
    return split.read(range(len(split)))[:, 0, 0, 0].tolist()


def rows(encode, levels):
    return [{"bytes": encode(np.full((16, 16, 3), level, np.uint8)), "path": None} for level in levels]


def recorded(**features):
    return {"huggingface": json.dumps({"info": {"features": features}})}


IMAGE = {"_type": "Image"}


def test_without_pyarrow_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train.parquet").write_bytes(b"PAR1")
    with pytest.raises(BackendUnavailable, match="needs pyarrow: run pip install pyarrow"):
        open_source(tmp_path)


def test_files_of_the_hub_keep_names_and_order(write, encode, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    root = write["table"](tmp_path, names=("cat", "dog"))
    (root / "data" / "train-00000-of-00001.parquet").unlink()
    for part in range(3):  # 0, 10; 20, 30; 40, 50
        table = pyarrow.table({"image": rows(encode, [20 * part, 20 * part + 10]), "label": [part % 2, 1]})
        kinds = recorded(image=IMAGE, label={"_type": "ClassLabel", "names": ["cat", "dog"]})
        parquet.write_table(table.replace_schema_metadata(kinds), root / "data" / f"train-{part:05}-of-00003.parquet")
    source = open_source(root)
    assert (source.kind, source.classes, len(source.test)) == ("table", ("cat", "dog"), 8)
    assert values(source.train) == [0, 10, 20, 30, 40, 50]
    assert source.train.labels.tolist() == [0, 1, 1, 1, 0, 1]
    order = [5, 0, 3]
    assert source.train.read(order)[:, 0, 0, 0].tolist() == [50, 0, 30]


@pytest.mark.parametrize("form", ["stream", "file"])
@pytest.mark.parametrize("layout", ["dict", "single", "cache"])
def test_arrow_files_are_mapped(encode, tmp_path, form, layout):
    pyarrow = pytest.importorskip("pyarrow")

    def arrow(path, levels):
        path.parent.mkdir(parents=True, exist_ok=True)
        table = pyarrow.table({"img": rows(encode, levels), "label": [level % 2 for level in range(len(levels))]})
        new = pyarrow.ipc.new_stream if form == "stream" else pyarrow.ipc.new_file
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)

    if layout == "dict":
        (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
        arrow(tmp_path / "train" / "data-00000-of-00001.arrow", [1, 2, 3])
        arrow(tmp_path / "validation" / "data-00000-of-00001.arrow", [4, 5])
    elif layout == "cache":
        arrow(tmp_path / "default" / "beans-train.arrow", [1, 2, 3])
        arrow(tmp_path / "default" / "beans-validation.arrow", [4, 5])
    else:
        arrow(tmp_path / "data-00000-of-00001.arrow", [1, 2, 3, 4])
        (tmp_path / "state.json").write_text("{}")
        with pytest.warns(match="has no test split"):
            source = open_source(tmp_path, split=0.5)
        assert sorted(values(source.train) + values(source.test)) == [1, 2, 3, 4]
        return
    source = open_source(tmp_path)
    assert (values(source.train), values(source.test)) == ([1, 2, 3], [4, 5])
    assert source.train.labels.tolist() == [0, 1, 0]


def save(path, columns, metadata=None):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)


def both(root, columns, metadata=None):
    for part in ("train", "test"):
        save(root / f"{part}.parquet", columns, metadata)
    return root


def test_of_several_labels_the_finer_counts_and_is_named(encode, tmp_path):
    pytest.importorskip("pyarrow")
    names = {"coarse_label": ["a", "b"], "fine_label": ["p", "q", "r"]}
    kinds = {name: {"_type": "ClassLabel", "names": held} for name, held in names.items()}
    columns = {"img": rows(encode, [1, 2, 3]), "coarse_label": [0, 1, 1], "fine_label": [0, 1, 2]}
    with pytest.warns(match="the labels are those of fine_label, not of coarse_label"):
        source = open_source(both(tmp_path, columns, recorded(img=IMAGE, **kinds)))
    assert (source.classes, source.train.labels.tolist()) == (("p", "q", "r"), [0, 1, 2])


def test_names_plain_bytes_and_paths(encode, tmp_path):
    pytest.importorskip("pyarrow")
    plain = [row["bytes"] for row in rows(encode, [1, 2])]
    source = open_source(both(tmp_path / "a", {"image": plain, "label": ["dog", "cat"]}))
    assert (source.classes, source.train.labels.tolist(), values(source.train)) == (("cat", "dog"), [1, 0], [1, 2])
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.png").write_bytes(plain[1])
    mixed = [{"bytes": plain[0], "path": "y.png"}, {"bytes": None, "path": "x.png"}]
    assert values(open_source(both(tmp_path / "b", {"image": mixed, "label": [0, 1]})).train) == [1, 2]


def test_an_unlabeled_test_split_gives_way_to_validation(encode, tmp_path):
    pytest.importorskip("pyarrow")
    columns = {"image": rows(encode, [1, 2]), "label": [0, 1]}
    both(tmp_path, columns)
    save(tmp_path / "validation.parquet", {"image": rows(encode, [7]), "label": [1]})
    assert values(open_source(tmp_path).test) == [1, 2]
    save(tmp_path / "test.parquet", {**columns, "label": [-1, -1]})
    with pytest.warns(match="the split test has no labels and is skipped"):
        assert values(open_source(tmp_path).test) == [7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, r"has the columns label: none or several hold images \(looked for image, img"),
        ({"image": None, "image2": [b""]}, "none or several hold images"),
        ({"label": None, "y": [0, 1]}, "none or several hold labels"),
        ({"label": [0.5, 1.0]}, r"the column label holds 0\.5: must be whole numbers or names"),
        ({"label": [0, None]}, "the column label holds None"),
        ({"label": [1, 2]}, "no training sample has label|smallest"),
        ({"image": [[1, 2], [3, 4]]}, "the column image is list<.*>, not encoded images"),
        ({"image": [b"no image", b"neither"]}, r"train\.parquet, row 0 cannot be read as an image"),
        ({"image": [None, None]}, "not encoded images|row 0 cannot be read"),
    ],
)
def test_refuses_other_tables(encode, tmp_path, change, message):
    pytest.importorskip("pyarrow")
    columns = {"image": rows(encode, [1, 2]), "label": [0, 1], **change}
    held = {name: values[:2] for name, values in columns.items() if values is not None}
    held = {name: values * (2 // len(values)) for name, values in held.items()}
    with pytest.raises(DataError, match=message):
        open_source(both(tmp_path, held))


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 1000])
def test_refuses_damage(tmp_path, suffix, content):
    pytest.importorskip("pyarrow")
    (tmp_path / f"train.{suffix}").write_bytes(content)
    with pytest.raises(DataError, match=rf"train\.{suffix} cannot be read as a table"):
        open_source(tmp_path)


def test_flipped_bits_of_a_mapped_file_are_read_or_refused(encode, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    file = tmp_path / "train.arrow"
    table = pyarrow.table({"image": [row["bytes"] for row in rows(encode, range(4))], "label": [0, 1, 0, 1]})
    with pyarrow.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table)
    good, refused = file.read_bytes(), 0
    for place in range(0, len(good), 5):
        raw = bytearray(good)
        raw[place] ^= 0x81
        file.write_bytes(raw)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                values(open_source(file, split=0.5).train)
        except DataError:
            refused += 1
    assert refused > 20
