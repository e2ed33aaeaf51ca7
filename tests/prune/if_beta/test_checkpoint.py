"""The checkpoint of a search that holds something else: the message names the file and the field."""

import json
from pathlib import Path

import pytest

from kdfast.errors import DataError, OutputError
from kdfast.files import without_seal
from kdfast.pruning.if_beta.checkpoint import SearchCheckpoint
from kdfast.pruning.if_beta.search import Schedule


def saved(path: Path) -> SearchCheckpoint:
    checkpoint = SearchCheckpoint(path / "idx.search.json", "the search")
    checkpoint.save(Schedule().initial())
    return checkpoint


def test_loads_what_it_saved(tmp_path: Path) -> None:
    assert saved(tmp_path).load() == Schedule().initial()


def test_file_that_is_no_json_can_be_deleted(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    checkpoint.path.write_bytes(b"")
    with pytest.raises(OutputError, match=r"not valid JSON .*delete it to start over, or choose another output name"):
        checkpoint.load()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("phi", [0.0]),
        ("phi", [1e300, 0.0]),
        ("step", -1),
        ("step", 3),
        ("step", 1.5),
        ("first", None),
        ("second", [0.0, -1.0]),
        ("quiet", "0"),
        ("path", [[1.0, -1.0]]),
        ("path", []),
        ("rewards", {}),
        ("rewards", [1.0]),
        ("seconds", -1),
        ("new", 1),
    ],
)
def test_names_the_field(tmp_path: Path, field: str, value: object) -> None:
    checkpoint = saved(tmp_path)
    content = json.loads(checkpoint.path.read_text())
    content["state"][field] = value
    checkpoint.path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=rf"idx\.search\.json: .*{field}.*delete it to start over"):
        checkpoint.load()


@pytest.mark.parametrize("name", ["phi", "step", "seconds"])
def test_refuses_a_changed_digit(tmp_path: Path, name: str) -> None:
    checkpoint = saved(tmp_path)
    before = checkpoint.load()
    content = json.loads(checkpoint.path.read_text())
    values = content["state"]
    if name == "step":
        for part in ("path", "rewards", "accuracies"):
            values[part].append([1.5, 1.5] if part == "path" else 0.5)
        values["step"] += 1
    elif name == "seconds":
        values["seconds"] += 1
    else:
        values["phi"][0] += 0.01
    checkpoint.path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"idx\.search\.json was damaged or edited.*delete it to start over"):
        checkpoint.load()
    checkpoint.save(before)
    assert checkpoint.load() == before


def test_reads_checkpoints_of_earlier_versions(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path)
    before = checkpoint.load()
    checkpoint.path.write_text(json.dumps(without_seal(json.loads(checkpoint.path.read_text()))))
    assert checkpoint.load() == before


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"format": NaN}', '{"x": ' + "1" * 5000 + "}", "\xff"])
def test_refuses_what_is_no_strict_json(tmp_path: Path, text: str) -> None:
    checkpoint = saved(tmp_path)
    checkpoint.path.write_text(text, encoding="latin-1")
    with pytest.raises(OutputError, match=r"idx\.search\.json is not valid JSON"):
        checkpoint.load()
