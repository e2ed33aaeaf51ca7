"""Statistics of rows: sections of comparable rows, and paired differences from random."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

BASELINE = "random"

# Settings that span a table; all others are equal within a section.
_AXES = ("method", "fraction", "kd", "seed")
# Settings that only runs with the teacher have.
_TEACHER = ("alpha", "temperature", "cache", "ce", "terms", "terms_warmup_epochs")
# Digests of the inputs of a score. The runs of a cell have the same ones.
_INPUTS = ("scores",)
# Whether the last epoch ends early; the same at a fraction.
_CUT = "cut"


@dataclass(frozen=True)
class Difference:
    """Difference of a method from random over their common seeds.

    Attributes:
        mean: Mean difference of test top-1 in percentage points; above 0: the method is better.
        half_width: Half the width of the 95% t-interval; NaN for one seed.
        n: Number of seeds.
    """

    mean: float
    half_width: float
    n: int

    @property
    def is_significant(self) -> bool:
        """Whether the interval excludes 0."""
        return abs(self.mean) > self.half_width


@dataclass(frozen=True)
class Section:
    """Rows that differ only in method, fraction, teacher and seed.

    Attributes:
        settings: Their common settings.
        top1: Test top-1 in percent by (method, fraction, kd), then by seed.
        rows: The rows.
        left_out: Number of rows whose scores come from other inputs than those of the last row of their cell, or
            whose steps were rounded to whole epochs, as in earlier versions, where others at their fraction were not.
    """

    settings: dict[str, Any]
    top1: dict[tuple[str, float, bool], dict[int, float]]
    rows: list[dict[str, Any]]
    left_out: int

    @property
    def methods(self) -> list[str]:
        """The methods in order of appearance, random first."""
        found = dict.fromkeys(row["method"] for row in self.rows)
        return sorted(found, key=lambda name: name != BASELINE)

    @property
    def fractions(self) -> list[float]:
        """The fractions, ascending."""
        return sorted({row["fraction"] for row in self.rows})

    def difference(self, method: str, fraction: float, kd: bool) -> Difference | None:
        """Return the difference of a method from random; None for random itself or if there are no common seeds."""
        ours, theirs = self.top1.get((method, fraction, kd)), self.top1.get((BASELINE, fraction, kd))
        common = sorted(ours.keys() & theirs.keys()) if ours and theirs else []
        if method == BASELINE or not common or ours is None or theirs is None:
            return None
        gaps = np.array([ours[seed] - theirs[seed] for seed in common])
        return Difference(float(gaps.mean()), half_width(gaps), len(gaps))


@dataclass(frozen=True)
class FullRun:
    """Runs on all data, a reference for those on subsets.

    Attributes:
        steps: Their steps.
        epochs: Their epochs; None where the last one ends early, and in rows of earlier versions.
        rows: The rows, one for each seed.
        same_steps: Fractions whose runs have the same number of steps, ascending.
        same_epochs: Fractions whose runs have the same number of epochs, ascending.
    """

    steps: int
    epochs: int | None
    rows: list[dict[str, Any]]
    same_steps: tuple[float, ...]
    same_epochs: tuple[float, ...]

    @property
    def top1(self) -> float:
        """Mean test top-1 in percent."""
        return float(np.mean([row["test_top1"] for row in self.rows]))


@dataclass(frozen=True)
class Comparison:
    """Runs on subsets that one chart can show, and the runs on all data to compare them with.

    Attributes:
        section: The runs on subsets; those on all data if there are no others.
        steps: The steps that its runs were asked for, ascending.
        full_rows: Rows of all data whose other settings are the same, for any number of steps.
    """

    section: Section
    steps: tuple[int, ...]
    full_rows: list[dict[str, Any]]

    def full_runs(self, kd: bool) -> list[FullRun]:
        """Return the references with or without the teacher, by ascending steps; one row of each seed, random first."""
        subsets = [row for row in self.section.rows if row["kd"] == kd and row["fraction"] < 1]
        found: dict[tuple[int, int | None], dict[int, dict[str, Any]]] = {}
        for row in sorted(self.full_rows, key=lambda row: row["method"] != BASELINE):
            if row["kd"] == kd and subsets:
                place = row["steps"], row.get("epochs")
                found.setdefault(place, {}).setdefault(row["seed"], row)
        return [
            FullRun(
                place[0],
                place[1],
                [rows[seed] for seed in sorted(rows)],
                _fractions(row for row in subsets if row["steps"] == place[0]),
                _fractions(row for row in subsets if place[1] is not None and row.get("epochs") == place[1]),
            )
            for place, rows in sorted(found.items(), key=lambda item: item[0][0])
        ]


def compare(sections: Iterable[Section]) -> list[Comparison]:
    """Arrange sections for charts: all data becomes a reference, and fractions that differ in steps join one chart.

    Sections join if they differ in the steps alone, and no two of them have runs on the same fraction: so a sweep whose
    fractions have different numbers of steps is one chart.

    Args:
        sections: As `group_rows` returns them.

    Returns:
        The comparisons, in order of their first section.
    """
    families: dict[str, list[Section]] = {}
    for section in sections:
        families.setdefault(_key(section.settings, without=("steps",)), []).append(section)
    return [comparison for members in families.values() for comparison in _compare_family(members)]


def _compare_family(members: list[Section]) -> list[Comparison]:
    full_rows = {row["key"]: row for section in members for row in section.rows if row["fraction"] == 1}
    parts = [(section.settings, [row for row in section.rows if row["fraction"] < 1]) for section in members]
    parts = [(settings, rows) for settings, rows in parts if rows]
    if not parts:
        return [Comparison(section, (section.settings["steps"],), []) for section in members]
    places = [{(row["fraction"], row["kd"]) for row in rows} for _, rows in parts]
    if sum(map(len, places)) == len(set().union(*places)):
        parts = [(parts[0][0], [row for _, rows in parts for row in rows])]
    return [
        Comparison(
            _section(settings, rows), tuple(sorted({row["settings"]["steps"] for row in rows})), [*full_rows.values()]
        )
        for settings, rows in parts
    ]


def _fractions(rows: Iterable[Mapping[str, Any]]) -> tuple[float, ...]:
    return tuple(sorted({row["fraction"] for row in rows}))


def half_width(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Return half the width of the 95% t-interval of the mean of independent values; NaN for one value."""
    n = len(values)
    if n < 2:
        return math.nan
    from scipy import stats

    return float(stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / math.sqrt(n))


def group_rows(rows: Iterable[Mapping[str, Any]]) -> list[Section]:
    """Group comparable rows into sections.

    Rows without the teacher belong to every section whose other settings they share. If a method was run again with
    scores from other inputs, only the rows with those of the last one count. Where some runs at a fraction end within
    an epoch, those of earlier versions, whose steps were rounded to whole epochs, do not count.

    Args:
        rows: Rows of results.jsonl, in order.

    Returns:
        The sections, in order of their first row.
    """
    with_teacher: dict[str, list[dict[str, Any]]] = {}
    plain: dict[str, list[dict[str, Any]]] = {}
    plain_key_of: dict[str, str] = {}
    for row in map(dict, rows):
        plain_key = _key(row["settings"], without=(*_AXES, *_INPUTS, _CUT, *_TEACHER))
        if row["kd"]:
            key = _key(row["settings"], without=(*_AXES, *_INPUTS, _CUT))
            with_teacher.setdefault(key, []).append(row)
            plain_key_of[key] = plain_key
        else:
            plain.setdefault(plain_key, []).append(row)
    groups = [(key, plain.get(plain_key_of[key], []) + members) for key, members in with_teacher.items()]
    groups += [(key, members) for key, members in plain.items() if key not in plain_key_of.values()]
    return [_section(json.loads(key), members) for key, members in groups]


def _section(settings: dict[str, Any], rows: list[dict[str, Any]]) -> Section:
    cells: dict[tuple[str, float, bool], list[dict[str, Any]]] = {}
    cut = {row["fraction"] for row in rows if row["settings"].get(_CUT)}
    for row in rows:
        if row["fraction"] in cut and not row["settings"].get(_CUT):
            continue
        cells.setdefault((row["method"], row["fraction"], row["kd"]), []).append(row)
    top1: dict[tuple[str, float, bool], dict[int, float]] = {}
    shown: list[dict[str, Any]] = []
    for cell, members in cells.items():
        inputs = _inputs(members[-1])
        by_seed = {row["seed"]: row for row in members if _inputs(row) == inputs}
        top1[cell] = {seed: row["test_top1"] for seed, row in by_seed.items()}
        shown += by_seed.values()
    return Section(settings, top1, shown, len(rows) - len(shown))


def _inputs(row: Mapping[str, Any]) -> list[Any]:
    return [row["settings"].get(name) for name in _INPUTS]


def _key(settings: Mapping[str, Any], *, without: tuple[str, ...]) -> str:
    return json.dumps({k: v for k, v in settings.items() if k not in without}, sort_keys=True)
