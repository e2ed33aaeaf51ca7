"""The page of an IF-Beta subset: any change of idx.json gives a page or a message that names the file and the field."""

import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kdfast.errors import DataError
from kdfast.files import seal
from kdfast.report.if_beta_page import write_if_beta_page

END = {"id": 3, "label": 1, "score": 0.5, "u": 0.25}
RECORD = {
    "method": "if-beta",
    "seed": 3,
    "parameters": {"fraction": 0.25},
    "if-beta": {
        "a": 1.5,
        "b": 0.75,
        "learned": [1.5, 0.75],
        "path": [[1.0, 1.0], [1.25, 0.9], [1.5, 0.75]],
        "rewards": [0.25, 0.5],
        "gain": {"difference": 0.01, "half_width": 0.005, "accuracy": 0.5, "baseline_accuracy": 0.4},
        "trials": 16,
        "score_seconds": 0.5,
        "search_seconds": 1.5,
        "ranks": {"edges": [0.0, 0.5, 1.0], "all": [4, 4], "kept": [0, 2]},
        "scores": {"edges": [-1.0, 0.0, 2.5], "all": [5, 3], "kept": [1, 1]},
        "classes": {"all": [4, 4], "kept": [1, 1]},
        "ends": {"lowest": [END], "highest": [END]},
        "distillation": {"student": "resnet32", "epochs": 240, "seconds": 100.0},
        "percent_of_distillation": 2.0,
        "preset": "paper",
        "flatten_seconds": 20.0,
        "epoch": {"network": "resnet56a", "seconds": 55.0},
        "epochs": 0.4,
    },
}
VALUES: list[Any] = [None, -1, 0, 2**62, 1e308, "x", []]


def places(value: Any, *way: str | int) -> Iterator[tuple[str | int, ...]]:
    """Yield the way to every value, from the outermost."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*way, key)
        if isinstance(inner, (dict, list)):
            yield from places(inner, *way, key)


def changed(way: tuple[str | int, ...], value: Any) -> dict:
    content = copy.deepcopy(RECORD)
    inner: Any = content
    for key in way[:-1]:
        inner = inner[key]
    if value is VALUES:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    return content


def page(content: dict, folder: Path) -> str:
    """Return the message of the error, or an empty text if there is a page."""
    (folder / "idx.json").write_text(json.dumps(content))
    try:
        write_if_beta_page(folder / "idx.json", folder / "page.html")
    except DataError as error:
        return str(error)
    return ""


def test_every_changed_value_gives_a_page_or_a_clear_message(tmp_path: Path) -> None:
    assert not page(RECORD, tmp_path)
    ways = list(places(RECORD))
    assert len(ways) > 60
    outcomes = [page(changed(way, value), tmp_path) for way in ways for value in (*VALUES, VALUES)]
    messages = [message for message in outcomes if message]
    assert len(messages) > len(outcomes) / 2
    for message in messages:
        assert message.startswith(str(tmp_path / "idx.json"))
        assert message.endswith(("write it again with kdfast prune", "pass the .json file beside idx.npy", "it again"))


@pytest.mark.parametrize(
    ("way", "value", "message"),
    [
        (("if-beta", "a"), "1.5", "field if-beta.a: expected float, got str"),
        (("if-beta", "path", 1), [1.0], "field if-beta.path[1]: expected array of length >= 2"),
        (("if-beta", "ranks", "kept"), [0], "field if-beta.ranks: its counts contradict each other"),
        (("if-beta", "classes", "kept"), [9, 0], "field if-beta.classes: its counts contradict each other"),
        (("if-beta", "scores", "edges"), [1.0, 0.0, 2.0], "field if-beta.scores: its counts contradict each other"),
        (("if-beta", "rewards"), [0.5], "field if-beta.path: 3 points for 1 rewards"),
        (("parameters", "fraction"), 1.5, "field parameters.fraction: expected float <= 1.0"),
    ],
)
def test_names_the_field(tmp_path: Path, way: tuple, value: Any, message: str) -> None:
    assert re.search(re.escape(message), page(changed(way, value), tmp_path))


@pytest.mark.parametrize(
    ("way", "value"), [(("seed",), 4), (("if-beta", "a"), 1.25), (("if-beta", "ranks", "kept"), [1, 1])]
)
def test_refuses_an_edited_record(tmp_path: Path, way: tuple, value: Any) -> None:
    sealed = seal(RECORD)
    assert not page(sealed, tmp_path)
    edited = {**changed(way, value), **{name: sealed[name] for name in sealed if name not in RECORD}}
    assert "idx.json was damaged or edited" in page(edited, tmp_path)


def test_reads_files_without_the_fields_of_presets(tmp_path: Path) -> None:
    content = copy.deepcopy(RECORD)
    for name in ("preset", "flatten_seconds", "epoch", "epochs"):
        del content["if-beta"][name]
    assert not page(content, tmp_path)
    text = (tmp_path / "page.html").read_text()
    assert "Flattening" not in text
    assert "sharpness" not in text


def test_says_whether_the_uniform_policy_was_used(tmp_path: Path) -> None:
    content = copy.deepcopy(RECORD)
    content["if-beta"]["gain"]["difference"] = 0.0
    assert not page(content, tmp_path)
    assert "the uniform policy was used" not in (tmp_path / "page.html").read_text()
    content["if-beta"] |= {"a": 1.0, "b": 1.0, "preset": "kdfast"}
    assert not page(content, tmp_path)
    assert "no; the uniform policy was used" in (tmp_path / "page.html").read_text()
