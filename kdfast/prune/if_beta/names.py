"""Parts by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from kdfast.errors import UsageError, did_you_mean

T = TypeVar("T")


def entry(table: Mapping[str, T], name: str, what: str) -> T:
    """Look a part up.

    Args:
        table: The known ones.
        name: A key.
        what: What they are, for the message.

    Raises:
        UsageError: There is none of that name; the nearest is suggested.
    """
    if name in table:
        return table[name]
    hint = did_you_mean(name, table)
    raise UsageError(f"no {what} of IF-Beta is named {name!r}: {hint}known: {', '.join(table)}")
