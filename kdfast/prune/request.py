"""The arguments of `kdfast prune`, checked before the data is read, and the subsets they specify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdfast.data.source import Source
from kdfast.errors import UsageError, unknown_name
from kdfast.progress import Progress
from kdfast.prune.options import OptionValue, complete_options
from kdfast.prune.rules.registry import get_rule
from kdfast.prune.score_file import ScoreFile, read_scores
from kdfast.prune.scores.base import HOW_TO_GET
from kdfast.prune.scores.compute import ScoreSources
from kdfast.prune.scores.registry import SCORES
from kdfast.prune.select import Selection, SelectionMethod, SubsetPipeline, published_rule
from kdfast.prune.selectors import SELECTORS

FRACTION_FIELD = "{fraction}"


def subset_paths(out: Path, fractions: Sequence[float]) -> list[Path]:
    """Return the path of each fraction's subset file.

    Args:
        out: The path given, with `{fraction}` in its name if there are several fractions.
        fractions: The fractions.

    Raises:
        UsageError: Two fractions would share a file.
    """
    names = [f"{fraction:g}" for fraction in fractions]
    if len(set(names)) < len(names):
        raise UsageError(f"`fractions` are {', '.join(names)}, and one appears twice: pass each once")
    if len(names) > 1 and FRACTION_FIELD not in out.name:
        raise UsageError(
            f"`out` is {out} for {len(names)} fractions: put {FRACTION_FIELD} into the name, as in "
            f"idx-{FRACTION_FIELD}.npy"
        )
    return [out.with_name(out.name.replace(FRACTION_FIELD, name)) for name in names]


@dataclass(frozen=True)
class PruneRequest:
    """The selection to make, and its inputs.

    Attributes:
        fractions: Shares of the training split to keep, one subset each.
        method: A key of `SCORES` or `SELECTORS`; None: `random`, unless `scores` is given.
        scores: A score file to use instead, or None.
        rule: A key of `RULES`; None: the rule published with the score.
        options: Options of the rule, or of the selector.
        score_options: Options of the score.
        balance: One of `kdfast.prune.rules.class_budget.BALANCE`.
        seed: Seed of scores, tie-breaks and random draws.
        device: Device for expensive computations.
        cache: Folder of a teacher's cache, or None.
        dynamics: Folder of training dynamics, or None.
    """

    fractions: tuple[float, ...]
    method: str | None = None
    scores: Path | None = None
    rule: str | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    score_options: Mapping[str, OptionValue] = field(default_factory=dict)
    balance: str = "balanced"
    seed: int = 0
    device: str = "cpu"
    cache: Path | None = None
    dynamics: Path | None = None

    @property
    def uses_selector(self) -> bool:
        """Whether the method is a selector: long-running, with a file to resume from."""
        return self.method in SELECTORS

    def check(self) -> None:
        """Check the arguments before any file is read.

        Raises:
            UsageError: A name or an option does not exist, or arguments exclude each other or are missing.
        """
        if self.scores is not None:
            if self.method is not None or self.score_options:
                raise UsageError(
                    "`scores` excludes `method` and `score_options`: the file contains finished scores, so omit them"
                )
            if self.rule is not None:
                complete_options(f"rule {self.rule!r}", get_rule(self.rule).options, self.options)
            return
        name = self.method or "random"
        if name not in SCORES and name not in SELECTORS:
            raise unknown_name("no pruning method is named", name, [*SCORES, *SELECTORS])
        if self.uses_selector and (self.rule is not None or self.score_options):
            raise UsageError(f"{name} selects the subset directly: omit `rule` and `score_options`")
        self._selection_method(name, published_rule(name)).check()
        if self.uses_selector and self.cache is None:
            raise UsageError(f"{name} needs {HOW_TO_GET['cache']}")

    def run(
        self, source: Source, states: Sequence[Path | None] | None = None, progress: Progress | None = None
    ) -> Iterator[Selection]:
        """Select the subsets, in the order of the fractions. All fractions are checked before the first.

        A selector's subsets are yielded one by one. Subsets by a score are all selected before the first is yielded, so
        that an error leaves none.

        Args:
            source: The data.
            states: For each fraction the file that a selector resumes from; None: none.
            progress: Called by a selector with (done, total, note).

        Raises:
            DataError, SubsetError, UsageError, CacheMismatch: As for scores and selections.
        """
        dynamics = None if self.uses_selector else self.dynamics
        sources = ScoreSources.open(source, cache=self.cache, dynamics=dynamics)
        files: dict[str, ScoreFile] = {}
        name = score = self.method or "random"
        if self.scores is not None:
            name = str(self.scores)
            files = {name: read_scores(self.scores, n=len(source.train), fingerprint=source.fingerprint)}
            score = files[name].method
        method = self._selection_method(name, published_rule(score))
        method.check(files)
        pipeline = SubsetPipeline(sources, files, balance=self.balance, device=self.device)
        for fraction in self.fractions:
            pipeline.check(method, fraction)
        selections = (
            pipeline.select(method, fraction, self.seed, state=state, progress=progress)
            for fraction, state in zip(self.fractions, states or [None] * len(self.fractions), strict=True)
        )
        yield from selections if self.uses_selector else list(selections)

    def _selection_method(self, name: str, published: str) -> SelectionMethod:
        options = tuple(self.options.items())
        if self.uses_selector:
            return SelectionMethod(name, options)
        return SelectionMethod(name, tuple(self.score_options.items()), self.rule or published, options)
