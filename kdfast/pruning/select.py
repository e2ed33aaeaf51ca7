"""Select subsets: the one pipeline behind `kdfast prune` and `kdfast sweep`."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import digest_of
from kdfast.errors import UsageError
from kdfast.files.arrays import map_read_only
from kdfast.progress import Progress
from kdfast.pruning.candidates import find_candidates
from kdfast.pruning.options import OptionValue, complete_options
from kdfast.pruning.rules.apply import check_required, select_subset
from kdfast.pruning.rules.class_budget import check_budgets
from kdfast.pruning.rules.registry import get_rule
from kdfast.pruning.score_file import ScoreFile
from kdfast.pruning.scores.base import HOW_TO_GET
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.scores.registry import SCORES, get_score
from kdfast.pruning.selector import SelectorInputs
from kdfast.pruning.selectors import SELECTORS

Options: TypeAlias = tuple[tuple[str, OptionValue], ...]


def published_rule(score: str) -> str:
    """Return the rule a score was published with; `hard` for scores not in the registry."""
    return SCORES[score].rule if score in SCORES else "hard"


@dataclass(frozen=True)
class SelectionMethod:
    """How to select a subset: by a score and a rule, or by a selector.

    Attributes:
        name: The name of a score file, or a key of `SCORES` or `SELECTORS`.
        options: Options of the score or the selector.
        rule: A key of `RULES`; None for a selector.
        rule_options: Options of the rule.
        score_options: Options of the score that a selector ranks by, if it is one of `SCORES`.
    """

    name: str
    options: Options = ()
    rule: str | None = None
    rule_options: Options = ()
    score_options: Options = ()

    def check(self, files: Collection[str] = ()) -> None:
        """Check names and options.

        Args:
            files: Names of score files; they take precedence over scores of the same name.

        Raises:
            UsageError: A name or an option does not exist (the nearest is suggested), or a value is not allowed.
        """
        if self.rule is None:
            self._check_selector(files)
            return
        if self.name not in files:
            complete_options(self.name, get_score(self.name).options, dict(self.options))
        elif self.options:
            raise UsageError(f"scores read from a file take no options, got {self.options[0][0]!r}: omit it")
        complete_options(f"rule {self.rule!r}", get_rule(self.rule).options, dict(self.rule_options))

    def _check_selector(self, files: Collection[str]) -> None:
        score = self.selector_options(files).get("score")
        if score not in files and score in SCORES:
            complete_options(str(score), get_score(str(score)).options, dict(self.score_options))
        elif self.score_options:
            raise UsageError(
                f"{self.name} ranks by {score or 'its own score'}, which takes no `score_options`: omit them"
            )

    def selector_options(self, files: Collection[str]) -> dict[str, OptionValue]:
        """Return every option of the selector with its value; arguments and errors as for `check`."""
        return SELECTORS[self.name].complete_options(self.name, dict(self.options), files)


@dataclass(frozen=True)
class Selection:
    """The samples kept at one fraction.

    Attributes:
        fraction: The fraction.
        ids: int64 (m,), ascending indices into the training split.
        provenance: The content of idx.json.
        details: What a selector reports about its selection, JSON values; empty for a rule.
        seconds: Time of the selection, including that of a score computed for it.
    """

    fraction: float
    ids: IntArray
    provenance: dict[str, Any]
    details: dict[str, Any]
    seconds: float

    def __str__(self) -> str:
        """Return method, rule, balance and seed on one line."""
        parameters = self.provenance["parameters"]
        rule = parameters.get("rule", "hard")
        by_rule = "" if rule == "hard" else f" by {rule}"
        return f"{self.provenance['method']}{by_rule}, {parameters['balance']}, seed {self.provenance['seed']}"


class SubsetPipeline:
    """Select subsets by any method, from inputs opened once.

    A score is computed once per seed, and the last selection is kept, so that runs which differ in other settings share
    it.

    Args:
        sources: The data, and what scores are computed from.
        files: Score files by name.
        balance: One of `kdfast.pruning.rules.class_budget.BALANCE`.
        device: Device for expensive computations.
        exclude: int64 (k,), distinct indices of samples that must not be kept; None: none.
    """

    def __init__(
        self,
        sources: ScoreSources,
        files: Mapping[str, ScoreFile] | None = None,
        *,
        balance: str = "balanced",
        device: str = "cpu",
        exclude: IntArray | None = None,
    ) -> None:
        self._sources, self._files = sources, files or {}
        self._balance, self._device, self._exclude = balance, device, exclude
        self._scores: dict[tuple[str, Options, int], ScoreFile] = {}
        self._last: tuple[tuple[SelectionMethod, float, int], Selection] | None = None

    def check(self, method: SelectionMethod, fraction: float) -> None:
        """Check that a fraction can be selected, before any work.

        Raises:
            SubsetError: The fraction keeps no sample, leaves a class empty, needs samples that are excluded, or the
                selector does not allow it.
            UsageError: The rule lacks an input.
        """
        labels = self._sources.source.train.labels
        if method.rule is not None:
            self._check_rule(method, method.rule)
        candidates = find_candidates(labels, fraction, self._balance, self._exclude)
        if method.rule is None:
            SELECTORS[method.name].check_fraction(candidates.fraction)
        check_budgets(candidates.take(labels), candidates.count, self._balance)

    def _check_rule(self, method: SelectionMethod, rule: str) -> None:
        """Check that the rule has its inputs: the cache's features, and what the score computes for it."""
        found = set() if self._sources.cache is None else {"features"}
        if method.name in self._files:
            found |= self._files[method.name].extras.keys()
        elif self._sources.dynamics is not None:
            score = get_score(method.name)
            found |= score.extras if "dynamics" in score.usable_inputs(dict(method.options)) else set()
        options = complete_options(f"rule {rule!r}", get_rule(rule).options, dict(method.rule_options))
        check_required(rule, options, found)

    def select(
        self,
        method: SelectionMethod,
        fraction: float,
        seed: int,
        *,
        state: Path | None = None,
        progress: Progress | None = None,
    ) -> Selection:
        """Select the samples to keep.

        Args:
            method: A checked method.
            fraction: Share of the training split to keep.
            seed: Seed of scores, tie-breaks and random draws.
            state: Checkpoint of a long-running selector, to resume from; not deleted.
            progress: Called by a selector with (done, total, note).

        Raises:
            UsageError, DataError, SubsetError: As `compute_score` and `select_subset`.
        """
        key = (method, fraction, seed)
        if self._last is None or self._last[0] != key:
            if method.rule is None:
                selection = self._by_selector(method, fraction, seed, state, progress)
            else:
                selection = self._by_rule(method, method.rule, fraction, seed)
            self._last = (key, selection)
        return self._last[1]

    def _by_rule(self, method: SelectionMethod, rule: str, fraction: float, seed: int) -> Selection:
        started = time.perf_counter()
        scored = self._score(method.name, method.options, seed)
        selecting = time.perf_counter()
        sources = self._sources
        cache = sources.cache if "features" in get_rule(rule).needs else None
        result = select_subset(
            scored.scores,
            sources.source.train.labels,
            fraction,
            rule=rule,
            balance=self._balance,
            seed=seed,
            features=None if cache is None else map_read_only(cache.features()),
            extras=scored.extras,
            options=dict(method.rule_options),
            exclude=self._exclude,
            device=self._device,
        )
        ended = time.perf_counter()
        parameters = {
            "fraction": fraction,
            "rule": rule,
            "balance": self._balance,
            "options": dict(result.options),
            **self._excluded(),
        }
        provenance = {
            "data": sources.source.fingerprint,
            "seed": seed,
            "seconds": scored.seconds + ended - selecting,
            "method": scored.method,
            "parameters": {**parameters, "score": scored.parameters},
            "scores": scored.digest,
            "sources": {**scored.sources, **({} if cache is None else {"cache": sources.digests["cache"]})},
            "score_seconds": scored.seconds,
        }
        return Selection(fraction, result.ids, provenance, {}, ended - started)

    def _by_selector(
        self, method: SelectionMethod, fraction: float, seed: int, state: Path | None, progress: Progress | None
    ) -> Selection:
        sources, selector = self._sources, SELECTORS[method.name]
        if sources.cache is None:
            raise UsageError(f"{method.name} needs {HOW_TO_GET['cache']}")
        options = method.selector_options(self._files)
        started = time.perf_counter()
        scored = self._selector_scores(method, options.get("score"), seed, progress)
        selecting = time.perf_counter()
        ids, details = selector.select(
            SelectorInputs(
                source=sources.source,
                cache=sources.cache,
                fraction=fraction,
                balance=self._balance,
                seed=seed,
                options=options,
                exclude=self._exclude,
                scores=scored,
                network=sources.network,
                device=self._device,
                state=state,
                progress=progress,
            )
        )
        ended = time.perf_counter()
        provenance: dict[str, Any] = {
            "data": sources.source.fingerprint,
            "seed": seed,
            "seconds": ended - selecting + (0 if scored is None else scored.seconds),
            "method": method.name,
            "parameters": {
                "fraction": fraction,
                "balance": self._balance,
                "options": options,
                **self._excluded(),
            },
            "scores": None,
            "sources": {"cache": sources.digests["cache"]},
            method.name: details,
        }
        if scored is not None:
            provenance["parameters"]["score"] = {"method": scored.method, **scored.parameters}
            provenance |= {"scores": scored.digest, "score_seconds": scored.seconds}
            # The selector's cache may be another one than that of the scores, whose own digest covers theirs.
            provenance["sources"] = {**scored.sources, **provenance["sources"]}
        return Selection(fraction, ids, provenance, details, ended - started)

    def _excluded(self) -> dict[str, Any]:
        """Return what identifies the excluded samples in idx.json; nothing if there are none."""
        if self._exclude is None:
            return {}
        return {"excluded": {"samples": len(self._exclude), "ids": digest_of(np.sort(self._exclude))}}

    def _selector_scores(
        self, method: SelectionMethod, score: OptionValue, seed: int, progress: Progress | None
    ) -> ScoreFile | None:
        """Return the scores that a selector's option `score` names; None for a score of the selector's own."""
        if score in self._files or score in SCORES:
            return self._score(str(score), method.score_options, seed, progress)
        return None

    def _score(self, name: str, options: Options, seed: int, progress: Progress | None = None) -> ScoreFile:
        if name in self._files:
            return self._files[name]
        key = (name, options, seed)
        if key not in self._scores:
            self._scores[key] = self._sources.score(
                name, seed=seed, options=dict(options), device=self._device, progress=progress
            )
        return self._scores[key]
