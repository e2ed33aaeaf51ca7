"""What a method is that chooses the subset itself, instead of a score from which a rule chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.prune.rules.base import Option, OptionValue, complete
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class ChooserInputs:
    """What such a method is given.

    Attributes:
        source: The data.
        cache: The teacher's cache of all of it.
        fraction: Share of the training split to keep.
        balance: `balanced`, `unbalanced` or `equal`, as in `kdfast.prune.rules.registry.decide`.
        seed: Seed of everything it draws.
        options: All its options with their values.
        device: Where to compute.
        state: File that holds long work while it is under way; the same choice goes on from it. The method leaves it
            there, and who has saved the result removes it. None keeps nothing.
        progress: Called with (done, in all, note) as the work advances.
    """

    source: Source
    cache: TeacherCache
    fraction: float
    balance: str
    seed: int
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    device: str = "cpu"
    state: Path | None = None
    progress: Callable[[int, int, str], None] | None = None


@dataclass(frozen=True)
class Chooser:
    """One such method.

    Attributes:
        choose: Returns int64 (m,) indices into the training split, ascending, and JSON values for idx.json.
        summary: One line for help.
        options: Its options by name.
        check: Raises a SubsetError for a fraction that it cannot choose.
    """

    choose: Callable[[ChooserInputs], tuple[IntArray, dict[str, Any]]]
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    check: Callable[[float], None] = lambda fraction: None

    def complete(self, name: str, given: Mapping[str, OptionValue]) -> dict[str, OptionValue]:
        """All options with their values; as `kdfast.prune.rules.base.complete`."""
        return complete(name, self.options, given)
