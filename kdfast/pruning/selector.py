"""Interface of methods that select a subset directly, without a score and a rule."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.errors import UsageError
from kdfast.nets.checkpoint import Model
from kdfast.progress import Progress
from kdfast.pruning.options import Option, OptionValue, complete_options
from kdfast.pruning.score_file import ScoreFile
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class SelectorInputs:
    """Inputs of a selector.

    Attributes:
        source: The data.
        cache: The teacher's cache of every training sample.
        fraction: Share of the training split to keep.
        balance: `balanced`, `unbalanced` or `equal`, see `kdfast.pruning.rules.class_budget`.
        seed: Seed of every random draw.
        options: Every option with its value.
        exclude: int64 (k,), distinct indices of samples that must not be kept, see
            `kdfast.pruning.candidates.find_candidates`; None: none.
        scores: The scores that the option `score` names, if they are those of a file or of the registry.
        network: The network that scores were computed with, or None.
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
    exclude: IntArray | None = None
    scores: ScoreFile | None = None
    network: Model | None = None
    device: str = "cpu"
    state: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class SubsetSelector:
    """A method that selects a subset directly.

    Attributes:
        select: Return int64 (m,) ascending indices into the training split, and JSON values for idx.json.
        summary: One line for help.
        options: Options by name. An option `score` may also name a score file; where it names one, or a score of the
            registry, the scores are computed for the selector.
        check_fraction: Raise SubsetError for a fraction that cannot be selected.
        presets: For each value of the option `preset` the options by name, in place of `options`. Empty: no presets.
    """

    select: Callable[[SelectorInputs], tuple[IntArray, dict[str, Any]]]
    summary: str
    options: Mapping[str, Option] = field(default_factory=dict)
    check_fraction: Callable[[float], None] = lambda fraction: None
    presets: Mapping[str, Mapping[str, Option]] = field(default_factory=dict)

    def complete_options(
        self, name: str, given: Mapping[str, OptionValue], files: Collection[str] = ()
    ) -> dict[str, OptionValue]:
        """Return every option with its value: the given one, else the default of the preset.

        Args:
            name: The selector's name, for messages.
            given: Values by name; None means not given.
            files: Names of score files, which the option `score` may name.

        Raises:
            UsageError: An option does not exist or belongs to another preset, or a value is not allowed.
        """
        options = dict(self._preset(name, given))
        if "score" in options:
            score = options["score"]
            options["score"] = replace(score, choices=tuple(dict.fromkeys([*score.choices, *files])))
        return complete_options(name, options, given)

    def _preset(self, name: str, given: Mapping[str, OptionValue]) -> Mapping[str, Option]:
        if not self.presets:
            return self.options
        option = self.options["preset"]
        preset = str(option.parse("preset", given.get("preset") or option.default))
        for other in given:
            owners = [owner for owner, options in self.presets.items() if other in options]
            if owners and preset not in owners:
                raise UsageError(
                    f"{name} has no option {other!r} with preset={preset}: omit it, or set preset={owners[0]}"
                )
        return self.presets[preset]
