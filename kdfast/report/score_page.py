"""The page about scores, as one file that loads nothing and runs nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kdfast.data.source import Source
from kdfast.data.subset import Subset, read_subset
from kdfast.files import atomic_write, check_writable
from kdfast.prune.score_file import ScoreFile, read_scores
from kdfast.report import score_sections as sections
from kdfast.report.page import check_page_path, document
from kdfast.teacher.cache import TeacherCache


@dataclass(frozen=True)
class ScorePage:
    """What a page about scores is made of.

    Attributes:
        source: The data.
        scored: The scores the page is about.
        others: More scores of the same data by name, to compare with.
        subsets: Subsets of the same data by name.
        cache: A teacher's cache, for its predictions, or None.
        few: How many classes to show samples of.
        each: How many samples at either end.
        fraction: Share of the hardest samples whose overlap is compared.
    """

    source: Source
    scored: ScoreFile
    others: Mapping[str, ScoreFile] = field(default_factory=dict)
    subsets: Mapping[str, Subset] = field(default_factory=dict)
    cache: TeacherCache | None = None
    few: int = 5
    each: int = 10
    fraction: float = 0.1

    def write(self, out: Path) -> int:
        """Write the page, atomically.

        Args:
            out: The .html file; its folder is made when missing.

        Returns:
            Its size in bytes.

        Raises:
            UsageError: `out` does not end in .html.
            OutputError: It cannot be written.
        """
        check_page_path(out)
        content = self.html().encode()
        check_writable(out.parent)
        with atomic_write(out) as file:
            file.write(content)
        return len(content)

    def html(self) -> str:
        """The page."""
        parts = [
            ("scores", "Scores by class", sections.histograms(self)),
            ("samples", "Highest and lowest samples", sections.samples(self)),
            ("balance", "Class balance of the subset" + "s" * (len(self.subsets) > 1), sections.balance(self)),
            ("overlap", "Overlap between methods", sections.overlap(self)),
            ("provenance", "Provenance", sections.provenance(self)),
        ]
        title = f"{self.scored.method} scores of {Path(self.source.path).name}"
        return document(title, sections.facts(self), parts)


def open_page(
    source: Source,
    scores: Path,
    *,
    others: Sequence[Path] = (),
    subsets: Sequence[Path] = (),
    cache: Path | None = None,
    few: int = 5,
    each: int = 10,
    fraction: float = 0.1,
) -> ScorePage:
    """Read what a page is made of, and make sure that all of it belongs to the data.

    Args:
        source: The data.
        scores: The file of scores the page is about.
        others: More files of scores.
        subsets: Subset files.
        cache: Folder of a teacher's cache, or None.
        few: As `ScorePage`, and so the others.
        each: Likewise.
        fraction: Likewise.

    Raises:
        DataError, SubsetError, CacheMismatch: A file is missing, damaged, or of other data.
    """
    n, fingerprint = len(source.train), source.fingerprint
    read = [read_scores(path, n=n, fingerprint=fingerprint) for path in (scores, *others)]
    names = _distinct([one.method for one in read], [path.stem for path in (scores, *others)])
    stems = _distinct([path.stem for path in subsets], [str(path) for path in subsets])
    held = [read_subset(path, n=n, fingerprint=fingerprint) for path in subsets]
    opened = None if cache is None else TeacherCache.open(cache, source=source)
    first, *more = read
    return ScorePage(
        source,
        first,
        dict(zip(names[1:], more, strict=True)),
        dict(zip(stems, held, strict=True)),
        opened,
        few,
        each,
        fraction,
    )


def _distinct(names: list[str], longer: list[str]) -> list[str]:
    """Names that differ: where one comes again, the longer way to say it, numbered if need be."""
    seen: list[str] = []
    for name, full in zip(names, longer, strict=True):
        choices = (name, f"{name} ({full})", *(f"{name} ({full}, {number})" for number in range(2, len(names) + 2)))
        seen.append(next(choice for choice in choices if choice not in seen))
    return seen
