"""Decode JSON that kdfast wrote earlier, and check it against a schema of `kdfast.files.schemas`.

A file on disk may be damaged, edited or written by another program. Everything read back passes here: strict JSON (no
NaN, no infinity), bounded nesting and integers, and every declared field with its declared type and range.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from kdfast.errors import DataError, KdfastError, UsageError
from kdfast.files.inputs import MAX_CONFIG_BYTES, MAX_JSON_BYTES, read_bounded
from kdfast.text import shorten_text

MAX_DEPTH = 64  # of nested dicts and lists; those who work on the values call themselves for each level
_MAX_DIGITS = 20
_MAX_YAML_DEPTH = 8  # what people write needs three
_SHOWN_REASON = 400

_WHERE = re.compile(r"^(?P<what>.*) - at `(?P<in_key>key` in `)?\$\.?(?P<field>.*)`$", re.DOTALL)
ADVICE = "it is damaged or not a kdfast file; write it again"


def read_regular(path: str | os.PathLike[str]) -> bytes:
    """Read a regular file of at most `MAX_JSON_BYTES`.

    Raises:
        OSError: The file is missing, unreadable, too large, or a pipe or device.
    """
    return read_bounded(path, MAX_JSON_BYTES)


def read_yaml(path: str | os.PathLike[str], what: str) -> Any:
    """Read a YAML file of plain values that a person wrote.

    Args:
        path: The file.
        what: Its name in messages.

    Raises:
        UsageError: It cannot be read, is no regular file, is too large, nested too deeply, has a key twice, or has
            anchors, by which a few lines can stand for a value that fills the memory.
    """
    import yaml

    try:
        text = read_bounded(path, MAX_CONFIG_BYTES).decode()
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if anchor := getattr(event, "anchor", None):
                raise UsageError(f"{what} has the anchor or alias {shorten_text(anchor)}: write the value out")
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_YAML_DEPTH:
                raise UsageError(f"{what} is nested too deeply: write one `key: value` per line")
        _refuse_repeated_keys(yaml.compose(text, Loader=yaml.SafeLoader), what)
        return yaml.safe_load(text)
    except OSError as error:
        raise UsageError(f"{what} cannot be read: {error.strerror or error}") from error
    except UsageError:
        raise
    except (ValueError, yaml.YAMLError) as error:  # ValueError: not UTF-8, or an impossible date or number
        raise UsageError(f"{what} cannot be read: {shorten_text(str(error), _SHOWN_REASON)}") from error


def _refuse_repeated_keys(node: Any, what: str) -> None:
    """Raise UsageError if a mapping has a key twice, of which YAML would keep the last one alone."""
    pairs = node.value if node is not None and node.id == "mapping" else []
    keys = [key.value for key, _ in pairs if key.id == "scalar"]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            raise UsageError(f"{what} has the key {shorten_text(key)} twice: write it once")
    inner = [value for _, value in pairs] or (node.value if node is not None and node.id == "sequence" else [])
    for child in inner:
        _refuse_repeated_keys(child, what)


def decode_json(
    raw: bytes,
    schema: Any,
    where: str | Path,
    *,
    error: type[KdfastError] = DataError,
    advice: str = ADVICE,
) -> Any:
    """Decode JSON and check it.

    Args:
        raw: The text.
        schema: A type of `kdfast.files.schemas`, or Any.
        where: The file, or the line of a file, for messages.
        error: The error to raise.
        advice: The end of messages, what to do.

    Returns:
        The decoded values, including fields that the schema does not declare.

    Raises:
        KdfastError: Of type `error`; the message names `where` and the field.
    """
    try:
        # Not msgspec.json: it refuses lone surrogates, by which Python writes names that are not UTF-8.
        value = json.loads(raw, parse_int=_parse_int, parse_float=_parse_float, parse_constant=_parse_float)
    except (ValueError, RecursionError) as exc:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise error(f"{where} is not valid JSON ({_sentence(str(exc))}): {advice}") from exc
    if _is_deep(value):
        raise error(f"{where} is nested more than {MAX_DEPTH} levels deep: {advice}")
    return check_type(value, schema, where, error=error, advice=advice)


def check_type(
    value: Any,
    schema: Any,
    where: str | Path,
    *,
    error: type[KdfastError] = DataError,
    advice: str = ADVICE,
) -> Any:
    """Check plain values against a schema and return them unchanged.

    Args:
        value: Dicts, lists, strings, numbers, booleans and None.
        schema: A type of `kdfast.files.schemas`, or Any.
        where: Where the values come from, for messages.
        error: The error to raise.
        advice: The end of messages, what to do.

    Raises:
        KdfastError: Of type `error`; the message names `where` and the field.
    """
    if schema is not Any:
        try:
            msgspec.convert(value, schema)
        except (ValueError, RecursionError) as exc:
            raise error(f"{where}: {_explain(str(exc))}: {advice}") from exc
    return value


def _parse_int(text: str) -> int:
    if len(text) <= _MAX_DIGITS and -(2**63) <= (value := int(text)) < 2**64:
        return value
    raise ValueError(f"the integer {text[:_MAX_DIGITS]}... is out of range")


def _parse_float(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError(f"the number {text[:_MAX_DIGITS]} is not finite")


def _is_deep(value: Any) -> bool:
    """Return whether dicts and lists are nested deeper than allowed, without recursion."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_DEPTH):
        parts = (item.values() if isinstance(item, dict) else item for item in level)
        level = [part for part in itertools.chain.from_iterable(parts) if isinstance(part, (dict, list))]
    return bool(level)


def _explain(message: str) -> str:
    """Return what a validation error says, without backticks, which name arguments in messages of kdfast."""
    match = _WHERE.match(message)
    if match is None:
        return _sentence(message)
    what = f"a key: {_sentence(match['what'])}" if match["in_key"] else _sentence(match["what"])
    return f"field {match['field']}: {what}" if match["field"] else what


def _sentence(text: str) -> str:
    return (text[:1].lower() + text[1:]).replace("`", "")
