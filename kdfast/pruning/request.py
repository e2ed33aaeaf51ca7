"""The arguments of `kdfast prune`, checked before the data is read, and the subsets they specify."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from kdfast.data.source import Source
from kdfast.data.stateless_random import IntArray
from kdfast.data.subset import open_subset
from kdfast.errors import DataError, UsageError, unknown_name
from kdfast.nets.checkpoint import Model
from kdfast.progress import Progress
from kdfast.pruning.flat_scores import FVM, flatten_network, fvm_scores, is_flattened, state_paths
from kdfast.pruning.options import OptionValue, complete_options
from kdfast.pruning.rules.registry import RULES, get_rule
from kdfast.pruning.score_file import ScoreFile, open_scores
from kdfast.pruning.scores.base import HOW_TO_GET
from kdfast.pruning.scores.compute import ScoreSources
from kdfast.pruning.scores.registry import SCORES
from kdfast.pruning.select import Selection, SelectionMethod, SubsetPipeline, published_rule
from kdfast.pruning.selectors import SELECTORS
from kdfast.teacher.flatten import FlattenConfig

FRACTION_FIELD = "{fraction}"
_HELD_SCORES = "scores"  # name of scores without a file
# A teacher that is not flat yet: flattening and scores together take less than four epochs of its training.
BRIEF_ITERATIONS = 500
BRIEF_SCORE: Mapping[str, OptionValue] = {"fisher": "validation"}


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
        scores: Scores to use instead of computing some: a file, or those that a program holds; or None.
        key: Which array of `scores` to use, if another program wrote it; None: the only one.
        higher: What a high score in it means, "hard" or "easy"; None: hard.
        rule: A key of `RULES`; None: the rule published with the score.
        options: Options of the rule, or of the selector.
        score_options: Options of the score; for a selector, of the score that its option `score` names.
        balance: One of `kdfast.pruning.rules.class_budget.BALANCE`.
        seed: Seed of scores, tie-breaks and random draws.
        device: Device for expensive computations.
        cache: Folder of a teacher's cache, or None.
        dynamics: Folder of training dynamics, or None.
        teacher: A network or its file, or None.
        exclude: A subset whose samples must not be kept: its file, or int64 (k,) distinct indices; None: none.
    """

    fractions: tuple[float, ...]
    method: str | None = None
    scores: Path | ScoreFile | None = None
    key: str | None = None
    higher: str | None = None
    rule: str | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    score_options: Mapping[str, OptionValue] = field(default_factory=dict)
    balance: str = "balanced"
    seed: int = 0
    device: str = "cpu"
    cache: Path | None = None
    dynamics: Path | None = None
    teacher: Path | Model | None = None
    exclude: Path | IntArray | None = None

    @property
    def uses_selector(self) -> bool:
        """Whether the method is a selector: long-running, with a file to resume from."""
        return self.method in SELECTORS

    @property
    def ranks_by_fvm(self) -> bool:
        """Whether the method is a selector that ranks by the score of a flattened network, which takes long."""
        return self.scores is None and self.uses_selector and self._selector_options().get("score") == FVM

    def check(self) -> None:
        """Check the arguments before any file is read.

        Raises:
            UsageError: A name or an option does not exist, or arguments exclude each other or are missing.
        """
        for given in ("key", "higher"):
            if self.scores is None and getattr(self, given) is not None:
                raise UsageError(f"`{given}` says how to read `scores`, which is not given: pass it too")
        if self.scores is not None and not self.uses_selector:
            if self.method is not None or self.score_options:
                raise UsageError(
                    "`scores` excludes `method` and `score_options`: the file contains finished scores, so omit them; "
                    f"only the methods that select the subset directly ({', '.join(SELECTORS)}) can rank by it"
                )
            if self.rule is not None:
                complete_options(f"rule {self.rule!r}", get_rule(self.rule).options, self.options)
            return
        name = self.method or "random"
        if name not in SCORES and name not in SELECTORS:
            if name in RULES:
                raise UsageError(f"{name} is a rule, not a method: pass it as `rule`, with a score as `method`")
            raise unknown_name("no pruning method is named", name, [*SCORES, *SELECTORS])
        if self.uses_selector and self.rule is not None:
            raise UsageError(f"{name} selects the subset directly: omit `rule`")
        if self.scores is not None and "score" in self.options:
            raise UsageError(f"`scores` excludes the option score of {name}: the file contains the scores; omit one")
        self._selection_method(name, published_rule(name)).check(self._file_names)
        if self.uses_selector and self.cache is None:
            raise UsageError(f"{name} needs {HOW_TO_GET['cache']}")
        if self.ranks_by_fvm and self.teacher is None:
            raise UsageError(
                f"{name} ranks by {FVM}, which needs a network: pass `teacher`, or finished scores as `scores`, or "
                "another score with the option score"
            )

    def run(
        self,
        source: Source,
        states: Sequence[Path | None] | None = None,
        progress: Progress | None = None,
        *,
        score_state: Path | None = None,
    ) -> Iterator[Selection]:
        """Select the subsets, in the order of the fractions. All fractions are checked before the first.

        A selector's subsets are yielded one by one. Subsets by a score are all selected before the first is yielded, so
        that an error leaves none.

        Args:
            source: The data.
            states: For each fraction the file that a selector resumes from; None: none.
            progress: Called by a selector with (done, total, note).
            score_state: Where a selector that ranks by `influence-fvm` keeps the state of flattening and the scores:
                the two files of `kdfast.pruning.flat_scores.state_paths`. None: nowhere.

        Raises:
            DataError, SubsetError, UsageError, CacheMismatch: As for scores and selections.
        """
        method, sources, pipeline = self._open(source)
        if self.ranks_by_fvm:
            pipeline = self._with_flat_scores(sources, score_state, progress)
        selections = (
            pipeline.select(method, fraction, self.seed, state=state, progress=progress)
            for fraction, state in zip(self.fractions, states or [None] * len(self.fractions), strict=True)
        )
        yield from selections if self.uses_selector else list(selections)

    def check_data(self, source: Source) -> None:
        """Open every input and check it, and the fractions, without computing anything; errors as for `run`."""
        self._open(source)

    def _open(self, source: Source) -> tuple[SelectionMethod, ScoreSources, SubsetPipeline]:
        sources = ScoreSources.open(source, cache=self.cache, dynamics=self.dynamics, teacher=self.teacher)
        files: dict[str, ScoreFile] = {}
        name = score = self.method or "random"
        if self.scores is not None:
            file = self._read_scores(source)
            files = {self._file_names[0]: file}
            if not self.uses_selector:
                name, score = self._file_names[0], file.method
        method = self._selection_method(name, published_rule(score))
        method.check(files)
        pipeline = self._pipeline(sources, files)
        for fraction in self.fractions:
            pipeline.check(method, fraction)
        return method, sources, pipeline

    def _pipeline(self, sources: ScoreSources, files: Mapping[str, ScoreFile]) -> SubsetPipeline:
        exclude = self.exclude
        if isinstance(exclude, Path):
            exclude = open_subset(exclude, sources.source).ids
        return SubsetPipeline(sources, files, balance=self.balance, device=self.device, exclude=exclude)

    def _selection_method(self, name: str, published: str) -> SelectionMethod:
        options = tuple(self.options.items())
        if self.uses_selector:
            ranked = (("score", self._file_names[0]),) if self._file_names else ()
            return SelectionMethod(name, (*options, *ranked), score_options=tuple(self.score_options.items()))
        return SelectionMethod(name, tuple(self.score_options.items()), self.rule or published, options)

    @property
    def _file_names(self) -> tuple[str, ...]:
        """The name of the score file for the pipeline, if there is one."""
        if self.scores is None:
            return ()
        return (self.scores.name if isinstance(self.scores, Path) else _HELD_SCORES,)

    def _read_scores(self, source: Source) -> ScoreFile:
        if isinstance(self.scores, Path):
            return open_scores(self.scores, source, key=self.key, higher=self.higher)
        assert self.scores is not None
        if self.scores.data != source.fingerprint:
            raise DataError(f"`scores` are of other data than {source.path}: score this data")
        return self.scores

    def _selector_options(self) -> dict[str, OptionValue]:
        return self._selection_method(str(self.method), "").selector_options(self._file_names)

    def _with_flat_scores(self, sources: ScoreSources, state: Path | None, progress: Progress | None) -> SubsetPipeline:
        """Return a pipeline with the scores of the network, which is flattened unless it is flat already."""
        flat_state, score_state = (None, None) if state is None else state_paths(state)
        held = cast(float, self._selector_options().get("held", FlattenConfig.held))
        config = FlattenConfig(iterations=BRIEF_ITERATIONS, held=held, seed=self.seed)
        options = dict(self.score_options)
        if sources.network is not None and not is_flattened(sources.network):
            options = {**BRIEF_SCORE, **options}
        sources = flatten_network(sources, config, device=self.device, state=flat_state, progress=progress)
        scores = fvm_scores(sources, options, seed=self.seed, device=self.device, state=score_state, progress=progress)
        return self._pipeline(sources, {FVM: scores})
