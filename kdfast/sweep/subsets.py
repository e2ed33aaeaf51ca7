"""From a recipe to the samples it keeps."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.dynamics.reader import Dynamics
from kdfast.errors import UsageError
from kdfast.prune.rules.registry import choose
from kdfast.prune.score_file import ScoreFile
from kdfast.prune.scores.registry import Scored, ScoreInputs, score
from kdfast.prune.selectors import CHOOSERS, ChooserInputs
from kdfast.sweep.recipes import Recipe
from kdfast.sweep.spec import Options
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class Chosen:
    """A subset.

    Attributes:
        ids: int64 (m,), indices into the training split, ascending.
        facts: What the method says about its choice, JSON values.
        seconds: Time it took, a score that was there already not counted.
    """

    ids: IntArray
    facts: dict[str, Any]
    seconds: float


class Subsets:
    """Chooses subsets; a score is computed once a seed, and the last subset is remembered.

    Args:
        source: The data.
        cache: The teacher's cache, or None.
        dynamics: Recorded dynamics, or None.
        files: Score files by name.
        device: Where heavy work runs.
    """

    def __init__(
        self,
        source: Source,
        cache: TeacherCache | None,
        dynamics: Dynamics | None,
        files: Mapping[str, ScoreFile],
        device: str,
    ) -> None:
        self._source, self._labels = source, source.train.labels
        self._cache, self._dynamics, self._files, self._device = cache, dynamics, files, device
        self._scores: dict[tuple[str, Options, int], Scored] = {}
        self._last: tuple[tuple[Recipe, float, int], Chosen] | None = None

    def choose(
        self,
        recipe: Recipe,
        fraction: float,
        seed: int,
        *,
        state: Path | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Chosen:
        """The samples that a recipe keeps; every class keeps its share.

        Args:
            recipe: How to choose.
            fraction: Share of the training split.
            seed: Seed of random scores, of draws and of ties.
            state: File that a method which chooses by itself keeps long work in, and goes on from; it stays there.
            progress: Told of such work: (done, in all, note).

        Raises:
            UsageError, DataError, SubsetError: As `score` and `decide`.
        """
        key = (recipe, fraction, seed)
        if self._last is None or self._last[0] != key:
            started = time.perf_counter()
            facts: dict[str, Any] = {}
            if recipe.rule:
                ids = self._by_rule(recipe, fraction, seed)
            else:
                ids, facts = self._by_itself(recipe, fraction, seed, state, progress)
            self._last = (key, Chosen(ids, facts, time.perf_counter() - started))
        return self._last[1]

    def _by_rule(self, recipe: Recipe, fraction: float, seed: int) -> IntArray:
        scored = self._score(recipe, seed)
        return choose(
            scored.values,
            self._labels,
            fraction,
            rule=recipe.rule,
            seed=seed,
            features=self._cache.features() if self._cache is not None and "cache" in recipe.inputs else None,
            extras=scored.extras,
            options=dict(recipe.rule_options),
            device=self._device,
        )

    def _by_itself(
        self,
        recipe: Recipe,
        fraction: float,
        seed: int,
        state: Path | None,
        progress: Callable[[int, int, str], None] | None,
    ) -> tuple[IntArray, dict[str, Any]]:
        if self._cache is None:
            raise UsageError(f"{recipe} needs --cache")
        chooser = CHOOSERS[recipe.score]
        inputs = ChooserInputs(
            source=self._source,
            cache=self._cache,
            fraction=fraction,
            balance="balanced",
            seed=seed,
            options=chooser.complete(recipe.score, dict(recipe.options)),
            device=self._device,
            state=state,
            progress=progress,
        )
        return chooser.choose(inputs)

    def _score(self, recipe: Recipe, seed: int) -> Scored:
        if recipe.score in self._files:
            file = self._files[recipe.score]
            return Scored(file.scores, file.extras)
        key = (recipe.score, recipe.options, seed)
        if key not in self._scores:
            self._scores[key] = score(recipe.score, self._inputs(recipe, seed))
        return self._scores[key]

    def _inputs(self, recipe: Recipe, seed: int) -> ScoreInputs:
        cache = self._cache if "cache" in recipe.inputs else None
        return ScoreInputs(
            labels=self._labels,
            seed=seed,
            logits=None if cache is None else cache.identity_logits(),
            features=None if cache is None else cache.features(),
            dynamics=self._dynamics if "dynamics" in recipe.inputs else None,
            device=self._device,
            options=dict(recipe.options),
        )
