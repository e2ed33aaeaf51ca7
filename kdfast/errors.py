"""The kinds of error kdfast raises, and the exit code each one has on the command line.

Every message says what was given, what is needed, and what to do.

| exit code | meaning |
|---|---|
| 0 | all planned work ran |
| 1 | an error kdfast did not foresee |
| 2 | wrong usage of the command line |
| 3 | bad or mismatching data, cache, subset or checkpoint |
| 4 | the output cannot be written (read-only, full, or already in use) |
| 5 | training diverged: the loss is not finite |
| 6 | a solver did not reach its tolerance |
| 75 | interrupted, resumable by the same command |
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


class KdfastError(Exception):
    """Base of all errors that kdfast raises on purpose."""

    exit_code = 1


class UsageError(KdfastError, ValueError):
    """Options that do not make sense, alone or together."""

    exit_code = 2


class ShapeError(KdfastError, ValueError):
    """A tensor has the wrong shape, or a value lies outside its range."""

    exit_code = 3


class DataError(KdfastError, ValueError):
    """A data source is missing, damaged or unusable."""

    exit_code = 3


class SubsetError(KdfastError, ValueError):
    """A subset file is malformed or does not fit the data."""

    exit_code = 3


class CacheMismatch(KdfastError, ValueError):
    """A teacher's cache is damaged or belongs to other data, another teacher or other views."""

    exit_code = 3


class CheckpointError(KdfastError, ValueError):
    """A checkpoint cannot be read safely or holds another network."""

    exit_code = 3


class OutputError(KdfastError, RuntimeError):
    """An output folder or file cannot be written."""

    exit_code = 4


class DivergedError(KdfastError, RuntimeError):
    """Training stopped because the loss is not finite."""

    exit_code = 5


class SolveError(KdfastError, RuntimeError):
    """A linear system or an optimum was not reached to the tolerance asked for."""

    exit_code = 6


class BackendUnavailable(KdfastError, RuntimeError):
    """A backend was asked for by name and cannot run here."""

    exit_code = 2


class Interrupted(KdfastError, RuntimeError):
    """Stopped by a signal after saving; the same command goes on from there."""

    exit_code = 75


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the part of a message that suggests the nearest known name, or an empty string if none is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"did you mean {near[0]!r}? " if near else ""


def unknown_name(what: str, name: str, known: Iterable[str]) -> UsageError:
    """Return the error for a name that is not known; it suggests the nearest known name and lists all of them.

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
