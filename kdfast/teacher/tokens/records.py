"""One text of a log: the response of an inference server, or a row of a table, as a dict.

Known are the responses of OpenAI's and vLLM's completions and chat completions, vLLM's own `prompt_logprobs` and
`logprobs`, SGLang's `meta_info`, and plain rows with `values` and `ids`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from kdfast.errors import DataError
from kdfast.teacher.tokens.failures import FailedRequest, find_failure
from kdfast.teacher.tokens.sequence import UNKNOWN, Rows

_TOKEN_ID = "token_id:"
_PROMPT_KEYS = ("prompt_token_ids", "input_ids", "token_ids")
_OUTPUT_KEYS = ("token_ids", "output_ids")
_NUMBERED = re.compile(r"(?:[A-Za-z][^0-9]*)?([0-9]{1,18})")  # 17, request-17
DEFAULT_NAMES = {"values": "values", "ids": "ids", "labels": "labels", "sequence": "sequence"}


class Position(NamedTuple):
    """Entries of a position: pairs of class and log-probability, its token, and how many entries are the top ones.

    Where their number is not known (None), a token that is the least probable of them may have been added.
    """

    entries: list[tuple[int, float]]
    label: int = UNKNOWN
    top: int | None = None


class RecordReader:
    """Reads records.

    Args:
        names: Names of the fields `values`, `ids`, `labels` and `sequence`, where they differ.
        tokens: Class of each token's text, for records that name tokens by their texts.
    """

    def __init__(self, names: Mapping[str, str] | None = None, tokens: Mapping[str, int] | None = None) -> None:
        self._names = DEFAULT_NAMES | dict(names or {})
        self._tokens = tokens

    def read(self, record: object) -> Rows:
        """Return the rows of a record.

        Raises:
            FailedRequest: It has no log-probabilities, since the server did not answer the request.
            DataError: The record is of another kind, or lacks something; the message says what.
        """
        if not isinstance(record, Mapping):
            raise DataError(f"it is a {type(record).__name__}: must be an object with fields")
        sequence = self._sequence(record)
        try:
            rows = self._rows(record)
        except (AttributeError, TypeError, ValueError, LookupError, OverflowError) as error:
            failure = find_failure(record)
            if failure is not None:
                raise FailedRequest(failure, sequence) from error
            if isinstance(error, DataError):
                raise
            reason = repr(error)[:150]
            raise DataError(f"its log-probabilities are not in the form of their kind ({reason})") from error
        return Rows(rows.values, rows.ids, rows.offsets, rows.labels, rows.tops, sequence)

    def _rows(self, record: Mapping[str, Any]) -> Rows:
        if self._names["values"] in record:
            return self._plain(record)
        body = _unwrap(record)
        for find in (self._prompt, self._generated, _sglang):
            positions = find(body)
            if positions is not None:
                return _to_rows(positions)
        held = ", ".join(sorted(map(str, body))[:8]) or "nothing"
        raise DataError(
            f"it has no log-probabilities of known form, only {held}: it needs prompt_logprobs, logprobs, meta_info, "
            f"or {self._names['values']} and {self._names['ids']}"
        )

    def _sequence(self, record: Mapping[str, Any]) -> int | None:
        name = self._names["sequence"]
        found = _to_lists(record.get(name))
        if found is None:
            if name != DEFAULT_NAMES["sequence"]:
                raise DataError(f"it has no {name}, the number of the text")
            return None
        if isinstance(found, int) and not isinstance(found, bool):
            return found
        named = _NUMBERED.fullmatch(found) if isinstance(found, str) else None
        if named is not None:
            return int(named.group(1))
        raise DataError(f"{name} is {found!r}: must be an integer, or end in one, the number of the text")

    def _plain(self, record: Mapping[str, Any]) -> Rows:
        names = self._names
        if names["ids"] not in record:
            raise DataError(f"it has {names['values']}, but no {names['ids']}, the classes of the log-probabilities")
        values, ids = ([_to_lists(row) or () for row in _to_lists(record[names[part]])] for part in ("values", "ids"))
        counts = [len(row) for row in values]
        if counts != [len(row) for row in ids]:
            raise DataError(f"{names['values']} and {names['ids']} have different numbers of entries")
        labels = _to_lists(record.get(names["labels"]))
        return Rows(
            np.array([-np.inf if value is None else value for value in chain(*values)], np.float64),
            _integers(chain(*ids)),
            np.cumsum([0, *counts]),
            None if labels is None else _integers(labels),
        )

    def _prompt(self, body: Mapping[str, Any]) -> list[Position] | None:
        """Read vLLM's `prompt_logprobs`, a dict for each token of the prompt, None for the first."""
        found = body.get("prompt_logprobs")
        return None if found is None else _label(list(map(self._position, found)), body, _PROMPT_KEYS)

    def _generated(self, body: Mapping[str, Any]) -> list[Position] | None:
        found = body.get("logprobs")
        if isinstance(found, Mapping):
            if found.get("content") is not None:
                return list(map(self._chat_position, found["content"]))
            if found.get("top_logprobs") is not None:
                return self._completion(found)
            return None
        return None if found is None else _label(list(map(self._position, found)), body, _OUTPUT_KEYS)

    def _position(self, entries: Mapping[Any, Any] | None) -> Position:
        """Read a dict of log-probabilities by class, which are numbers or objects with `logprob` and `rank`."""
        pairs: list[tuple[int, float]] = []
        ranks: list[Any] = []
        for token, given in (entries or {}).items():
            value = given["logprob"] if isinstance(given, Mapping) else given
            ranks.append(given.get("rank") if isinstance(given, Mapping) else None)
            if value is not None:
                is_id = isinstance(token, int) or token.isdecimal()
                pairs.append((int(token) if is_id else self._class(token), float(value)))
        if None in ranks:
            return Position(pairs)
        # Ranks count from 1, so one above the number of entries is that of the token of the text, which was added.
        extra = bool(ranks) and max(ranks) > len(ranks)
        return Position(pairs, top=len(pairs) - extra)

    def _chat_position(self, entry: Mapping[str, Any]) -> Position:
        """Read a token, among whose top ones some servers count the drawn one although it is none."""
        own = self._chat_class(entry)
        entries = [(self._chat_class(top), top["logprob"]) for top in entry.get("top_logprobs") or ()]
        return Position(_pairs([*entries, (own, entry["logprob"])]), own)

    def _completion(self, found: Mapping[str, Any]) -> list[Position]:
        positions = []
        own_values = found.get("token_logprobs") or [None] * len(found["top_logprobs"])
        for token, value, entries in zip(found["tokens"], own_values, found["top_logprobs"], strict=True):
            own = self._class(token)
            pairs = [(self._class(text), number) for text, number in (entries or {}).items()]
            positions.append(Position(_pairs([*pairs, (own, value)]), own))
        return positions

    def _chat_class(self, entry: Mapping[str, Any]) -> int:
        found = entry.get("id")  # llama.cpp
        return found if isinstance(found, int) else self._class(entry["token"])

    def _class(self, token: object) -> int:
        """Return the class of a token that is given by its text, or as vLLM's `token_id:17`."""
        text = str(token)
        if self._tokens is not None and text in self._tokens:
            return self._tokens[text]
        digits = text.removeprefix(_TOKEN_ID)
        if digits != text and digits.isdecimal():
            return int(digits)
        if self._tokens is not None:
            raise DataError(f"the token {text!r} is not among `tokens`, the classes of texts")
        raise DataError(
            f"the token {text!r} is given by its text: ask the server for ids (vLLM: --return-tokens-as-token-ids), or "
            "pass `tokens`, the class of each text"
        )


def _unwrap(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a response that holds log-probabilities."""
    response = record.get("response")
    if isinstance(response, Mapping) and isinstance(response.get("body"), Mapping):  # OpenAI's batches
        record = response["body"]
    for name in ("choices", "outputs"):
        choices = record.get(name)
        if record.get("prompt_logprobs") is None and isinstance(choices, Sequence) and not isinstance(choices, str):
            if len(choices) != 1:
                raise DataError(f"it holds {len(choices)} {name}: write one text per record")
            return dict(choices[0])
    return record


def _sglang(body: Mapping[str, Any]) -> list[Position] | None:
    """Read SGLang's lists of (log-probability, class, text), of the input if it was asked for, else of the output."""
    info = body.get("meta_info")
    if not isinstance(info, Mapping):
        return None
    for side in ("input", "output"):
        tops = info.get(f"{side}_top_logprobs")
        if not tops or not any(tops):  # without logprob_start_len, the input has no more than a None
            continue
        own = info.get(f"{side}_token_logprobs") or [None] * len(tops)
        positions = []
        for entries, token in zip(tops, own, strict=True):
            pairs = _pairs((int(entry[1]), entry[0]) for entry in entries or ())
            label = UNKNOWN if token is None else int(token[1])
            added = _pairs([(label, token[0])]) if pairs and token is not None else []
            positions.append(Position([*pairs, *added], label, len(pairs)))
        return positions
    return None


def _pairs(entries: Iterable[tuple[int, Any]]) -> list[tuple[int, float]]:
    """Return the entries with a log-probability; JSON writers put null in place of -inf."""
    return [(token, float(value)) for token, value in entries if value is not None]


def _label(positions: list[Position], body: Mapping[str, Any], names: tuple[str, ...]) -> list[Position]:
    """Add the tokens of the text, where the record has them."""
    for name in names:
        tokens = body.get(name)
        if tokens is not None:
            if len(tokens) != len(positions):
                raise DataError(f"{name} has {len(tokens)} tokens, and there are {len(positions)} positions")
            return [one._replace(label=int(token)) for one, token in zip(positions, tokens, strict=True)]
    return positions


def _to_rows(positions: list[Position]) -> Rows:
    entries = [entry for position in positions for entry in position.entries]
    counts = [len(position.entries) for position in positions]
    return Rows(
        np.array([value for _, value in entries], np.float64),
        np.array([token for token, _ in entries], np.int64),
        np.cumsum([0, *counts]),
        np.array([position.label for position in positions], np.int64),
        np.array([_count_top(position) for position in positions], np.int64),
    )


def _count_top(position: Position) -> int:
    """Return how many entries are certainly the most probable classes."""
    if position.top is not None:
        return position.top
    known = dict(reversed(position.entries))  # the first entry of a class counts
    own = known.get(position.label)
    return len(known) - (own is not None and own <= min(known.values()))


def _to_lists(values: Any) -> Any:
    """Return lists or a number of an array or tensor, and anything else as it is."""
    return values.tolist() if hasattr(values, "tolist") else values


def _integers(values: Iterable[Any]) -> Any:
    """Return an int64 array, also of no values; floats stay floats, to be refused."""
    found = np.array(list(map(_to_lists, values)))
    return found.astype(np.int64) if not found.size else found
