"""Type of the callbacks that report progress."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

# Called with (done, total, note).
Progress: TypeAlias = Callable[[int, int, str], None]
