"""Data of a page about scores, subsets or both, checked against the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from kdfast.data.source import Source, sample_files
from kdfast.data.subset import Subset, open_subset
from kdfast.errors import UsageError
from kdfast.pruning.score_file import ScoreFile, is_foreign, open_scores
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class ScorePageData:
    """Everything that the page shows.

    Attributes:
        source: The data.
        scored: The scores that the page is about; None for a page about subsets alone.
        others: Further scores of the same data to compare with, by name.
        subsets: Subsets of the same data, by name.
        cache: A teacher's cache for its predictions, or None.
        sample_classes: Number of classes of which to show samples.
        samples_per_end: Number of samples to show at either end of a class, and of those kept and dropped.
        fraction: Share of the highest scores whose overlap to compare.
        seed: Seed of the kept and dropped samples to show.
    """

    source: Source
    scored: ScoreFile | None
    others: Mapping[str, ScoreFile] = field(default_factory=dict)
    subsets: Mapping[str, Subset] = field(default_factory=dict)
    cache: TeacherCache | None = None
    sample_classes: int = 5
    samples_per_end: int = 10
    fraction: float = 0.1
    seed: int = 0

    @property
    def score_files(self) -> dict[str, ScoreFile]:
        """All scores by name, first those that the page is about."""
        return {} if self.scored is None else {self.scored.method: self.scored, **self.others}

    @cached_property
    def files(self) -> Sequence[str] | None:
        """The path of each training sample; None if the samples are no files."""
        return sample_files(self.source.train)


def read_score_page_data(
    source: Source,
    scores: Path | None,
    *,
    others: Sequence[Path] = (),
    key: Sequence[str] = (),
    higher: Sequence[str] = (),
    subsets: Sequence[Path] = (),
    cache: Path | None = None,
    sample_classes: int = 5,
    samples_per_end: int = 10,
    fraction: float = 0.1,
    seed: int = 0,
) -> ScorePageData:
    """Read the files of a page and check that they belong to the data.

    Args:
        source: The data.
        scores: The score file that the page is about; None for a page about subsets alone.
        others: Further score files.
        key: Keys of the scores in files of other programs: one for all of these files, or one for each score file.
        higher: What a high score means in them, "hard" or "easy": likewise.
        subsets: Subset files.
        cache: Folder of a teacher's cache, or None.
        sample_classes: As in `ScorePageData`, like the following arguments.
        samples_per_end: Likewise.
        fraction: Likewise.
        seed: Likewise.

    Raises:
        DataError, SubsetError, CacheMismatch: A file is missing, damaged, or belongs to other data.
    """
    paths = [*([] if scores is None else [scores]), *others]
    score_files = [
        open_scores(path, source, key=own_key, higher=own_higher)
        for path, own_key, own_higher in zip(
            paths, _one_each("key", key, paths), _one_each("higher", higher, paths), strict=True
        )
    ]
    names = _unique_names([file.method for file in score_files], [path.stem for path in paths])
    subset_names = _unique_names([path.stem for path in subsets], [str(path) for path in subsets])
    read = [open_subset(path, source) for path in subsets]
    return ScorePageData(
        source,
        score_files[0] if score_files else None,
        dict(zip(names[1:], score_files[1:], strict=True)),
        dict(zip(subset_names, read, strict=True)),
        None if cache is None else TeacherCache.open(cache, source=source, check_views=False),
        sample_classes,
        samples_per_end,
        fraction,
        seed,
    )


def _one_each(name: str, given: Sequence[str], paths: Sequence[Path]) -> list[str | None]:
    """Return the value for each score file; one value is for all files that kdfast did not write."""
    if len(given) > 1 and len(given) != len(paths):
        raise UsageError(
            f"`{name}` is given {len(given)} times for {len(paths)} score files: pass it once, or for each"
        )
    if len(given) == 1 and len(paths) > 1:
        return [given[0] if is_foreign(path) else None for path in paths]
    return list(given) or [None] * len(paths)


def _unique_names(names: list[str], details: list[str]) -> list[str]:
    """Return distinct names: a repeated name gets its detail in parentheses, and a number if that repeats too."""
    unique: list[str] = []
    for name, detail in zip(names, details, strict=True):
        numbered = (f"{name} ({detail}, {number})" for number in range(2, len(names) + 2))
        choices = (name, f"{name} ({detail})", *numbered)
        unique.append(next(choice for choice in choices if choice not in unique))
    return unique
