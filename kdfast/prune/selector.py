"""Interface of methods that select a subset directly, without a score and a rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.progress import Progress
from kdfast.prune.options import Option, OptionValue
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class SelectorInputs:
    """Inputs of a selector.

    Attributes:
        source: The data.
        cache: The teacher's cache of every training sample.
        fraction: Share of the training split to keep.
        balance: `balanced`, `unbalanced` or `equal`, see `kdfast.prune.rules.class_budget`.
        seed: Seed of every random draw.
        options: Every option with its value.
        device: Device to compute on.
        state: File in which the selector saves long work, to resume the same selection from. The selector leaves the
            file in place; the caller removes it once the result is saved. None: save nothing.
        progress: Called with (done, total, note) as the work advances.
    """

    source: Source
    cache: TeacherCache
    fraction: float
    balance: str
    seed: int
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    device: str = "cpu"
    state: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class SubsetSelector:
    """A method that selects a subset directly.

    Attributes:
        select: Return int64 (m,) ascending indices into the training split, and JSON values for idx.json.
        summary: One line for help.
        options: Options by name.
        check_fraction: Raise SubsetError for a fraction that cannot be selected.
    """

    select: Callable[[SelectorInputs], tuple[IntArray, dict[str, Any]]]
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    check_fraction: Callable[[float], None] = lambda fraction: None
