"""Records of requests that failed: what the inference server said in place of log-probabilities.

Servers report a failure in different places: OpenAI's batches in `error`, or in the body of a response with a status
other than 200 (0 where there was no answer); vLLM and SGLang as an object of type "error", as `error` of the response,
or as the finish reason "abort".
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from kdfast.errors import DataError

_LONGEST = 200  # characters of a server's message
_FAILED_FINISH = ("abort", "error")


class FailedRequest(DataError):
    """A request failed.

    Attributes:
        sequence: Number of the text; None: not given.
    """

    def __init__(self, failure: str, sequence: int | None) -> None:
        super().__init__(f"{failure}: request the text again, or pass `skip_failed` to keep its number without tokens")
        self.sequence = sequence


def find_failure(record: Mapping[str, Any]) -> str | None:
    """Return which request failed and what the server said, or None if the record does not tell of a failure."""
    said = next(_failures(record), None)
    if said is None:
        return None
    name = record.get("custom_id")
    request = f"the request {_shorten(name)!r}" if isinstance(name, (str, int)) else "its request"
    return f"{request} failed ({said})"


def _failures(record: Mapping[str, Any]) -> Iterator[str]:
    response = record.get("response")
    body = response.get("body") if isinstance(response, Mapping) else None
    parts = [part for part in (record, response, body) if isinstance(part, Mapping)]
    status = next((part["status_code"] for part in parts if isinstance(part.get("status_code"), int)), 200)
    prefix = "" if 200 <= status < 300 else f"status {status}: "
    for part in parts:
        error = part.get("error")
        if error and isinstance(error, (str, Mapping)):
            yield prefix + _describe(error)
        if part.get("object") == "error":
            yield prefix + _describe(part)
    if prefix:
        yield f"status {status}"
    for part in parts:
        for finish in _finish_reasons(part):
            kind = finish.get("type") if isinstance(finish, Mapping) else finish
            if kind in _FAILED_FINISH:
                said = finish.get("message") if isinstance(finish, Mapping) else None
                yield f"finish reason {kind}" + (f": {_shorten(said)}" if said else "")
    if "response" in record and response is None:
        yield "there is no response"


def _finish_reasons(part: Mapping[str, Any]) -> Iterator[Any]:
    info, choices = part.get("meta_info"), part.get("choices")
    if isinstance(info, Mapping):
        yield info.get("finish_reason")
    for choice in choices if isinstance(choices, list) else ():
        if isinstance(choice, Mapping):
            yield choice.get("finish_reason")


def _describe(error: str | Mapping[str, Any]) -> str:
    """Return a server's error as one short line."""
    if isinstance(error, str):
        return _shorten(error)
    inner = error.get("error")
    if inner and isinstance(inner, (str, Mapping)):  # vLLM's batches
        return _describe(inner)
    message = error.get("message")
    if not message:
        return _shorten(json.dumps(error, default=str))
    kind = next((error[name] for name in ("code", "type") if isinstance(error.get(name), str)), None)
    return _shorten(message if kind is None else f"{kind}: {message}")


def _shorten(text: object) -> str:
    line = " ".join(str(text).replace("`", "'").split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 3] + "..."
