"""Errors that kdfast raises, with their exit codes on the command line.

Every message states what was given, what is needed, and what to do. Arguments are named in backticks, for example
"`batch_size` is 0: pass at least 1". The command line replaces such a name with the option (`--batch-size`), so library
code never mentions options.

| exit code | meaning |
|---|---|
| 0 | all planned work ran |
| 1 | an unexpected error |
| 2 | wrong usage of the command line |
| 3 | bad or mismatching data, cache, subset or checkpoint |
| 4 | the output cannot be written (read-only, full, or already in use) |
| 5 | training diverged: the loss is not finite |
| 6 | a solver did not reach its tolerance |
| 75 | interrupted; run the same command again to resume |
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")

_DIGEST = re.compile(r"[0-9a-f]{20,}")


class KdfastError(Exception):
    """Base class of the errors that kdfast raises."""

    exit_code = 1


class UsageError(KdfastError, ValueError):
    """An option or argument is invalid, alone or in combination."""

    exit_code = 2


class ShapeError(KdfastError, ValueError):
    """A tensor has the wrong shape, or a value is out of range."""

    exit_code = 3


class DataError(KdfastError, ValueError):
    """A data source is missing, damaged or unusable."""

    exit_code = 3


class SubsetError(KdfastError, ValueError):
    """A subset file is malformed or does not match the data."""

    exit_code = 3


class CacheMismatch(KdfastError, ValueError):
    """A teacher's cache is damaged, or was made for other data, another teacher or other views."""

    exit_code = 3


class CheckpointError(KdfastError, ValueError):
    """A checkpoint cannot be read safely, or is for a different network."""

    exit_code = 3


class OutputError(KdfastError, RuntimeError):
    """An output folder or file cannot be written."""

    exit_code = 4


class DivergedError(KdfastError, RuntimeError):
    """Training stopped because the loss is not finite, or ended with nothing learned."""

    exit_code = 5


class SolveError(KdfastError, RuntimeError):
    """A solver did not reach the requested tolerance."""

    exit_code = 6


class BackendUnavailable(KdfastError, RuntimeError):
    """A backend requested by name cannot run here."""

    exit_code = 2


class Interrupted(KdfastError, RuntimeError):
    """A signal stopped the run after it was saved; the same command resumes it."""

    exit_code = 75


class DataWarning(UserWarning):
    """What a reader of data left out or decided, such as files that are no images."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the part of a message that suggests the closest known name, or an empty string if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}? " if near else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for an unknown name; its message suggests the closest known name and lists all of them.

    Args:
        what: The start of the message, such as "no score is named".
        name: The unknown name.
        known: The known names.
    """
    names = list(known)
    return UsageError(f"{what} {name!r}: {did_you_mean(name, names)}known: {', '.join(names) or 'none'}")


def look_up(registry: Mapping[str, T], name: str, kind: str) -> T:
    """Return the entry of a registry.

    Args:
        registry: Entries by name.
        name: The name of the entry.
        kind: What the entries are, such as "score", for the message.

    Raises:
        UsageError: There is no such entry.
    """
    if name not in registry:
        raise unknown_name(f"no {kind} is named", name, registry)
    return registry[name]


def shorten(value: Any) -> str:
    """Return a JSON value as text for a message, with digests cut to 12 digits and long lists to their ends."""
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)) and len(value) > 8:
        return f"[{shorten(value[0])}, {shorten(value[1])}, ..., {shorten(value[-1])}]"
    return _DIGEST.sub(lambda digest: digest[0][:12] + "...", json.dumps(value))


def describe_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return every difference between two mappings, once, as "`name` was X, is Y; ...".

    A difference in a nested mapping is named "`name` (key)".
    """
    return "; ".join(
        f"{name} was {shorten(before)}, is {shorten(after)}" for name, before, after in _changes(old, new, "")
    )


def _changes(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*new, *old]):
        before, after = old.get(key), new.get(key)
        inner = f"{name} ({key})" if name else f"`{key}`" if key.isidentifier() else key
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _changes(before, after, inner)
        elif before != after:
            yield inner, before, after
