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
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


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
    """Training stopped because the loss is not finite."""

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


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return the part of a message that suggests the closest known name, or an empty string if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
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
