"""JSON that is read back: strict, bounded, and checked by a schema; the message names the file and the field."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import Struct

from kdfast.errors import CacheMismatch, DataError
from kdfast.files import read_json, schemas, write_json
from kdfast.files.validate import MAX_DEPTH, check_type, decode_json

CLASSES = [
    kind
    for kind in vars(schemas).values()
    if isinstance(kind, type) and issubclass(kind, Struct) and kind is not Struct
]


class Inner(Struct):
    values: list[float]
    name: str | None = None


class Outer(Struct):
    count: schemas.Count
    inner: dict[str, Inner]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"count": 1, "inner": {"a": {"values": [1, "2"]}}}', "field inner.*values.*: expected float, got str"),
        ('{"count": -1, "inner": {}}', "field count: expected int >= 0"),
        ('{"count": true, "inner": {}}', "field count: expected int, got bool"),
        ('{"count": 1.5, "inner": {}}', "field count: expected int, got float"),
        ('{"count": 1}', "missing required field inner"),
        ('{"count": 1, "inner": {"a": {}}}', "missing required field values"),
        ('{"count": 1, "inner": {"a": {"values": [], "name": 3}}}', "field inner.*name: expected"),
        ("[]", "expected object, got array"),
        ("null", "expected object, got null"),
    ],
)
def test_names_the_file_and_the_field(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CacheMismatch, match=rf"a\.json: .*{message}.*: build it again$"):
        read_json(tmp_path / "a.json", Outer, error=CacheMismatch, advice="build it again")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "NaN",
        "[Infinity]",
        "[-Infinity]",
        "1e999",
        "[" * 100_000,
        '{"a":' * 100_000,
        "1" * 5000,
        str(2**64),
        str(-(2**63) - 1),
        "'a'",
        "{} {}",
        "\udcff",
    ],
)
def test_refuses_what_is_no_strict_json(text: str) -> None:
    with pytest.raises(DataError, match="file is not valid JSON"):
        decode_json(text.encode(errors="surrogateescape"), Any, "file")


def test_limits_the_nesting() -> None:
    deep = lambda levels: (b"[" * levels) + b"1" + (b"]" * levels)  # noqa: E731
    decode_json(deep(MAX_DEPTH), Any, "file")
    with pytest.raises(DataError, match=f"nested more than {MAX_DEPTH} levels"):
        decode_json(deep(MAX_DEPTH + 1), Any, "file")


def test_keeps_undeclared_fields_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    content = {"count": 2**53, "inner": {}, "more": [2**64 - 1, -(2**63), 1e308, "caf\udce9"]}
    write_json(tmp_path / "a.json", content)
    assert read_json(tmp_path / "a.json", Outer) == content


@pytest.mark.parametrize("schema", CLASSES, ids=lambda kind: kind.__name__)
def test_every_schema_refuses_other_kinds(schema: type) -> None:
    """Also shows that its annotations can be resolved."""
    for value in ([], "x", 1, None, {1: 2}):
        with pytest.raises(DataError, match="file"):
            check_type(value, schema, "file")
