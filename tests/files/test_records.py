from __future__ import annotations

import hashlib
import json
import os

import pytest

from kdfast import files
from kdfast.errors import CacheMismatch, DataError


def test_json_round_trip_and_errors(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"ä": [1, 2.5, None]})
    assert files.read_json(path) == {"ä": [1, 2.5, None]}
    with pytest.raises(ValueError, match="JSON"):
        files.write_json(path, float("nan"))
    assert files.read_json(path) == {"ä": [1, 2.5, None]}
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="not valid JSON"):
        files.read_json(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(CacheMismatch, match="not valid JSON"):
        files.read_json(path, error=CacheMismatch)
    with pytest.raises(DataError, match="No such file"):
        files.read_json(tmp_path / "missing.json")


def test_every_changed_byte_of_a_sealed_file_is_detected(tmp_path):
    path = tmp_path / "a.json"
    files.write_sealed(path, {"name": "ä", "values": [1, 2.5, None], "nested": {"b": 1, "a": 2}})
    assert files.read_sealed(path) == {"name": "ä", "values": [1, 2.5, None], "nested": {"b": 1, "a": 2}}
    raw = path.read_bytes()
    for position in range(len(raw)):
        path.write_bytes(raw[:position] + bytes([raw[position] ^ 1]) + raw[position + 1 :])
        with pytest.raises(ValueError):  # noqa: PT011  (the JSON parser and the digest have different messages)
            files.read_sealed(path)
    for content in (b"[1]", b"{}", raw + b"\n", raw[:-5], b"NaN", b'{"a": NaN}', b"\xff"):
        path.write_bytes(content)
        with pytest.raises(ValueError):  # noqa: PT011
            files.read_sealed(path)
    with pytest.raises(FileNotFoundError):
        files.read_sealed(tmp_path / "missing.json")


def test_a_seal_survives_json_and_covers_every_field():
    fields = files.seal({"name": "caf\udce9", "pair": (1, 2.5), "by number": {3: None}, "nested": {"b": [True]}})
    read = json.loads(json.dumps(fields))
    assert files.matches_seal(read)
    assert files.without_seal(read) == {"name": "caf\udce9", "pair": [1, 2.5], "by number": {"3": None},
                                        "nested": {"b": [True]}}  # fmt: skip
    for name, value in (("name", "cafe"), ("pair", [1, 2.25]), ("nested", {"b": [1]}), ("more", 0)):
        assert not files.matches_seal({**read, name: value})
    assert files.matches_seal(files.without_seal(read)), "records of earlier versions"


def test_a_damaged_file_still_names_its_format(tmp_path):
    path = tmp_path / "f.json"
    files.write_sealed(path, {"format": "x-y", "more": 1})
    path.write_bytes(path.read_bytes()[:-20])
    assert files.has_format(path, "x-y")
    for name, text in (("x.y", path.read_text()), ("x-y", '{"format": "other", "is": "x-y"}'), ("x-y", "")):
        path.write_text(text)
        assert not files.has_format(path, name)
    assert not files.has_format(tmp_path / "missing", "x-y")
    assert not files.has_format(tmp_path, "x-y")


def test_sha256_of_json_ignores_the_order_of_keys():
    assert files.sha256_json({"a": 1, "b": {"c": 2, "d": 3}}) == files.sha256_json({"b": {"d": 3, "c": 2}, "a": 1})
    assert files.sha256_json({"a": 1}) != files.sha256_json({"a": 2})


def test_sha256_of_a_file(tmp_path):
    content = os.urandom(2_500_000)
    (tmp_path / "a").write_bytes(content)
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()
    with pytest.raises(DataError, match="No such file"):
        files.sha256_file(tmp_path / "b")
