"""From scores to subset files: one selection a fraction, with what idx.json says about it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import class_budgets, subset_size
from kdfast.errors import UsageError
from kdfast.prune.rules.base import OptionValue
from kdfast.prune.rules.registry import decide, rule_named
from kdfast.prune.score_file import ScoreFile, read_scores
from kdfast.prune.scores.base import MAKE_CACHE, unknown
from kdfast.prune.scores.compute import compute, open_inputs
from kdfast.prune.scores.registry import SCORES, method_named
from kdfast.prune.selectors import CHOOSERS, ChooserInputs
from kdfast.teacher.cache import TeacherCache

FIELD = "{fraction}"


@dataclass(frozen=True)
class Selection:
    """The samples kept at one fraction.

    Attributes:
        fraction: The fraction.
        ids: int64 (m,), indices into the training split, ascending.
        provenance: What idx.json is to say.
    """

    fraction: float
    ids: IntArray
    provenance: dict[str, Any]

    def __str__(self) -> str:
        """Method, rule, balance and seed, for a line of output."""
        parameters = self.provenance["parameters"]
        rule = parameters.get("rule", "hard")
        how = "" if rule == "hard" else f" by {rule}"
        return f"{self.provenance['method']}{how}, {parameters['balance']}, seed {self.provenance['seed']}"


def out_paths(out: Path, fractions: Sequence[float]) -> list[Path]:
    """Where the subset of each fraction goes.

    Args:
        out: The path given, with `{fraction}` in its name where there are several fractions.
        fractions: The fractions.

    Raises:
        UsageError: Fractions would share a file.
    """
    names = [f"{fraction:g}" for fraction in fractions]
    if len(set(names)) < len(names):
        raise UsageError(f"fractions {', '.join(names)}: one comes twice; give each once")
    if len(names) > 1 and FIELD not in out.name:
        raise UsageError(f"--out {out} for {len(names)} fractions: put {FIELD} into the name, as in idx-{FIELD}.npy")
    return [out.with_name(out.name.replace(FIELD, name)) for name in names]


def published_rule(method: str) -> str:
    """The rule that a score was published with; `hard` for scores of another origin."""
    return SCORES[method].rule if method in SCORES else "hard"


@dataclass(frozen=True)
class Request:
    """What is to be chosen, and from what.

    Attributes:
        fractions: Shares of the training split to keep, one selection each.
        balance: As in `kdfast.prune.rules.registry.decide`.
        seed: Seed of scores, tie-breaks and draws.
        device: Where heavy work runs.
        cache: Folder of a teacher's cache, or None.
        dynamics: Folder of training dynamics, or None.
        rule: A key of `kdfast.prune.rules.registry.RULES`; None for the one published with the score.
        options: Options of the rule, or of the method that chooses the subset itself.
        score_options: Options of the score.
    """

    fractions: tuple[float, ...]
    balance: str = "balanced"
    seed: int = 0
    device: str = "cpu"
    cache: Path | None = None
    dynamics: Path | None = None
    rule: str | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    score_options: Mapping[str, OptionValue] = field(default_factory=dict)

    def check(self, scores: Path | None, method: str | None) -> None:
        """Refuse names and options that cannot be right, before anything is read.

        Raises:
            UsageError: A name or an option is unknown, or scores and a method are both given.
        """
        if scores is not None:
            if method is not None or self.score_options:
                raise UsageError("--scores excludes --method and --score-option: the file says how it was scored")
        else:
            if (method or "random") not in SCORES:
                unknown("no pruning method is named", str(method), {**SCORES, **CHOOSERS})
            method_named(method or "random").complete(self.score_options)
        rule = self.rule or (published_rule(method or "random") if scores is None else None)
        if rule is not None:
            rule_named(rule).complete(rule, self.options)

    def choose_from(self, scores: Path | None, method: str | None, source: Source) -> list[Selection]:
        """Score, or read scores, and apply the rule.

        Args:
            scores: A file of scores, or None.
            method: Otherwise a key of `SCORES`; None for `random`.
            source: The data.

        Raises:
            DataError, SubsetError, UsageError, CacheMismatch: As those of scoring and `choose`.
        """
        inputs, digests = open_inputs(
            source,
            seed=self.seed,
            cache=self.cache,
            dynamics=self.dynamics,
            options=self.score_options,
            device=self.device,
        )
        if scores is not None:
            scored = read_scores(scores, n=len(source.train), fingerprint=source.fingerprint)
        else:
            scored = compute(method or "random", inputs, digests, source.fingerprint)
        rule = self.rule or published_rule(scored.method)
        used = {"cache": digests["cache"]} if "features" in rule_named(rule).needs and "cache" in digests else {}
        return [self._select(source, scored, rule, fraction, inputs.features, used) for fraction in self.fractions]

    def choose_by(
        self,
        method: str,
        source: Source,
        states: Sequence[Path | None] | None = None,
        progress: Callable[[int, int, str], None] | None = None,
    ) -> Iterator[Selection]:
        """Let a method of `CHOOSERS` choose, fraction by fraction; all are checked before the first.

        Args:
            method: Its name.
            source: The data.
            states: For each fraction the file that holds long work under way, see `ChooserInputs`; None: nowhere.
            progress: Called with (done, in all, note) as the work advances.

        Raises:
            UsageError: There is no cache, an option is unknown, or a rule or an option of a score is given.
            CacheMismatch: The cache is of other data or does not cover all of it.
            SubsetError: A fraction cannot be chosen.
        """
        chooser = CHOOSERS[method]
        if self.rule is not None or self.score_options:
            raise UsageError(f"{method} chooses the subset itself: --rule and --score-option do not apply to it")
        if self.cache is None:
            raise UsageError(f"{method} needs a teacher's cache: make one with {MAKE_CACHE}")
        options = chooser.complete(method, self.options)
        cache = TeacherCache.open(self.cache, source=source)
        cache.require(np.arange(len(source.train), dtype=np.int64))
        for fraction in self.fractions:
            chooser.check(fraction)
            samples = subset_size(len(source.train), fraction)
            if self.balance == "balanced":
                class_budgets(source.train.labels, samples)
        for fraction, state in zip(self.fractions, states or [None] * len(self.fractions), strict=True):
            started = time.perf_counter()
            inputs = ChooserInputs(
                source, cache, fraction, self.balance, self.seed, options, self.device, state, progress
            )
            ids, about = chooser.choose(inputs)
            head = {"fraction": fraction, "balance": self.balance, "options": options}
            provenance = {"method": method, "parameters": head, "scores": None, method: about}
            yield self._selection(source, fraction, ids, provenance, time.perf_counter() - started)

    def _select(
        self,
        source: Source,
        scored: ScoreFile,
        rule: str,
        fraction: float,
        features: npt.NDArray[np.float32] | None,
        used: Mapping[str, str],
    ) -> Selection:
        started = time.perf_counter()
        choice = decide(
            scored.scores,
            source.train.labels,
            fraction,
            rule=rule,
            balance=self.balance,
            seed=self.seed,
            features=features,
            extras=scored.extras,
            options=self.options,
            device=self.device,
        )
        options = dict(choice.options)
        head = {"fraction": fraction, "rule": rule, "balance": self.balance, "options": options}
        provenance = {
            "method": scored.method,
            "parameters": {**head, "score": scored.parameters},
            "scores": scored.digest,
            "sources": {**scored.sources, **used},
            "score_seconds": scored.seconds,
        }
        seconds = scored.seconds + time.perf_counter() - started
        return self._selection(source, fraction, choice.ids, provenance, seconds)

    def _selection(
        self, source: Source, fraction: float, ids: IntArray, provenance: dict[str, Any], seconds: float
    ) -> Selection:
        always = {"data": source.fingerprint, "seed": self.seed, "seconds": seconds}
        return Selection(fraction, ids, {**always, **provenance})
