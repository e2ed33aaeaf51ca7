"""The page of a sweep: accuracy against the kept fraction and against cost, and paired intervals."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kdfast.report.markup import Safe, render, statistics_list, table, tag
from kdfast.report.page import render_page
from kdfast.sweep.charts import Axis, Line, Mark, Reference, breakable, chart, interval, legend, reach_of
from kdfast.sweep.costs import STAGES, TRAINING, known_seconds, row_seconds
from kdfast.sweep.summary import BASELINE, Comparison, Difference, FullRun, Section, compare
from kdfast.text import counted

# Settings that the page shows elsewhere, or of which digests stand in the rows.
_OMITTED = ("data", "cache", "scores", "cut", "steps", "method", "fraction", "kd", "seed")
_RADII = (3.0, 6.0)  # of the marks of the smallest and of the largest fraction, against cost
_NOTE = (
    "Mean over seeds; bars: ± one standard deviation. Dashed lines: the mean of runs on all data. Against cost, a "
    "larger mark stands for a larger fraction. The cost of a run is its training and whatever comes before it that its "
    "fraction needs, as if it were the only run: scores, the recording of dynamics, its share of the teacher's cache, "
    "and the selection. The training of the teacher is not part of it."
)
_PAIRED = (
    "Minus random: the difference in percentage points between runs of the same seed, with its 95% t-interval; "
    "one seed has no interval. Green or red: the interval excludes 0. Arrows: the difference lies beyond the edge."
)

Rows = Sequence[Mapping[str, Any]]


def render_sweep_page(name: str, sections: Sequence[Section]) -> str:
    """Return the HTML of the page.

    Args:
        name: Name of the sweep.
        sections: As `group_rows` returns them, at least one.
    """
    comparisons = compare(sections)
    several = len(comparisons) > 1
    parts = [
        (f"comparison-{number}", _heading(comparison, number if several else None), _render(comparison))
        for number, comparison in enumerate(comparisons, 1)
    ]
    provenance = ("provenance", "Settings", _render_settings(comparisons))
    return render_page(f"Sweep {name}", _render_statistics(sections), [*parts, provenance])


def _render_statistics(sections: Sequence[Section]) -> Safe:
    rows = list({row["key"]: row for section in sections for row in section.rows}.values())
    fractions = sorted({row["fraction"] for row in rows})
    left_out = sum(section.left_out for section in sections)
    return statistics_list(
        [
            ("Student", ", ".join(dict.fromkeys(str(section.settings["student"]) for section in sections))),
            ("Runs", f"{len(rows):,}"),
            *([("Left out, of other inputs or another length", f"{left_out:,}")] if left_out else []),
            ("Methods", f"{len({row['method'] for row in rows}):,}"),
            ("Kept fractions", ", ".join(f"{fraction:g}" for fraction in fractions)),
            ("Seeds", f"{len({row['seed'] for row in rows}):,}"),
            ("Training of all runs", f"{_seconds(sum(row['seconds'] for row in rows))} s"),
        ]
    )


def _heading(comparison: Comparison, number: int | None) -> str:
    first, last = comparison.steps[0], comparison.steps[-1]
    steps = f"{first:,} steps" if first == last else f"{first:,} to {last:,} steps"
    prefix = "" if number is None else f"{number}: "
    return f"{prefix}{comparison.section.settings['student']}, {steps}"


def _render(comparison: Comparison) -> Safe:
    parts = [tag("p", _NOTE, class_="note")]
    if len(comparison.section.methods) > 1 and BASELINE in comparison.section.methods:
        parts.append(tag("p", _PAIRED, class_="note"))
    for kd in (True, False):
        if any(row["kd"] == kd for row in comparison.section.rows):
            parts.append(_render_runs(comparison, kd))
    return render(parts)


def _render_runs(comparison: Comparison, kd: bool) -> Safe:
    section, full = comparison.section, comparison.full_runs(kd)
    cells = _cells(section, kd)
    methods = [method for method in section.methods if any(m == method for m, _ in cells)]
    fractions = sorted({fraction for _, fraction in cells})
    title = "With the teacher" if kd else "Without the teacher"
    trends = _trends(section, cells, methods, fractions)
    parts = [
        tag("h3", title),
        legend([(m, line) for m, (line, _) in zip(methods, trends, strict=True)], reference=bool(full)),
    ]
    by_fraction = chart(
        [Line(line.number, [_at(mark, fraction) for fraction, mark in marks]) for line, marks in trends],
        [Reference(run.top1, _name(run)) for run in full],
        Axis.of_values(fractions),
        "share of the training split kept",
        f"{title}: accuracy against the kept fraction",
        spread=True,
    )
    seconds = [mark.x for line, _ in trends for mark in line.marks] + [_mean_seconds(run.rows) for run in full]
    by_cost = chart(
        [line for line, _ in trends],
        [Reference(run.top1, _name(run), _mean_seconds(run.rows), _title(_name(run), run.rows)) for run in full],
        (axis := Axis.of_seconds(seconds)),
        f"seconds of a run{', logarithmic' if axis.log else ''}",
        f"{title}: accuracy against cost",
    )
    parts.append(tag("div", tag("figure", by_fraction), tag("figure", by_cost), class_="charts"))
    parts += [_fraction_table(section, methods, fraction, kd, cells) for fraction in fractions]
    if full:
        parts.append(_full_table(full))
    parts.append(_cost_table(methods, fractions, cells, full))
    return render(parts)


def _cells(section: Section, kd: bool) -> dict[tuple[str, float], Rows]:
    """Return the rows of each method and fraction."""
    cells: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in section.rows:
        if row["kd"] == kd:
            cells.setdefault((row["method"], row["fraction"]), []).append(row)
    return dict(cells)


def _trends(
    section: Section, cells: Mapping[tuple[str, float], Rows], methods: Sequence[str], fractions: Sequence[float]
) -> list[tuple[Line, list[tuple[float, Mark]]]]:
    """Return the line of each method against cost, and its marks with their fractions."""
    trends = []
    for number, method in enumerate(methods):
        marks = []
        for place, fraction in enumerate(fractions):
            rows = cells.get((method, fraction))
            if rows:
                radius = _RADII[0] + (_RADII[1] - _RADII[0]) * place / max(len(fractions) - 1, 1)
                title = _title(f"{method}, {fraction:g} kept", rows)
                mark = Mark(_mean_seconds(rows), _mean_top1(rows), _deviation(rows), radius, title)
                marks.append((fraction, mark))
        trends.append((Line(number, [mark for _, mark in marks]), marks))
    return trends


def _at(mark: Mark, fraction: float) -> Mark:
    return Mark(fraction, mark.y, mark.spread, 4.0, mark.title)


def _fraction_table(
    section: Section, methods: Sequence[str], fraction: float, kd: bool, cells: Mapping[tuple[str, float], Rows]
) -> Safe:
    """Render the results at one fraction, best first, with the differences from random."""
    present = sorted(
        (method for method in methods if (method, fraction) in cells), key=lambda m: -_mean_top1(cells[m, fraction])
    )
    gaps = {method: section.difference(method, fraction, kd) for method in present}
    reach = reach_of([gap for gap in gaps.values() if gap is not None])
    some = any(gap is not None for gap in gaps.values())
    first = cells[present[0], fraction][0]
    epochs = "" if first.get("epochs") is None else f", {counted(first['epochs'], 'epoch')}"
    counts = {len(cells[method, fraction]) for method in present}
    seeds = f", {counted(counts.pop(), 'seed')}" if len(counts) == 1 else ""
    caption = render(
        [
            tag("strong", f"{fraction:g} of the data"),
            f": {first['kept']:,} samples, {first['steps']:,} steps",
            epochs,
            seeds,
        ]
    )
    rows: list[list[object]] = []
    for method in present:
        members = cells[method, fraction]
        cost = _seconds(_mean_seconds(members))
        accuracy = _accuracy(members) + ("" if seeds else f" ({len(members)})")
        rows.append([breakable(method), accuracy, *([_gap_cell(gaps[method], reach)] if some else []), cost])
    titles = ["method", "top-1 (%)", *(["minus random"] if some else []), "seconds"]
    return table(caption, titles, rows, class_="compared")


def _gap_cell(gap: Difference | None, reach: float) -> Safe:
    if gap is None:
        return tag("td")
    text = f"{gap.mean:+.2f}"
    if gap.n > 1:
        text += f" [{gap.mean - gap.half_width:+.2f}, {gap.mean + gap.half_width:+.2f}]"
    return tag("td", tag("div", interval(gap, reach), tag("span", text), class_="gap"))


def _full_table(full: Sequence[FullRun]) -> Safe:
    rows = []
    for run in full:
        same = [
            f"the same {what} as {', '.join(f'{fraction:g}' for fraction in fractions)}"
            for what, fractions in (("steps", run.same_steps), ("epochs", run.same_epochs))
            if fractions
        ]
        epochs = "" if run.epochs is None else f"{run.epochs:,}"
        seconds = _seconds(_mean_seconds(run.rows))
        rows.append([f"{run.steps:,}", epochs, f"{_accuracy(run.rows)} ({len(run.rows)})", seconds, "; ".join(same)])
    caption = render([tag("strong", "All data"), " (seeds)"])
    return table(caption, ["steps", "epochs", "top-1 (%)", "seconds", "compares with"], rows, class_="full")


def _cost_table(
    methods: Sequence[str],
    fractions: Sequence[float],
    cells: Mapping[tuple[str, float], Rows],
    full: Sequence[FullRun],
) -> Safe:
    """Render the seconds of every stage."""
    named = [
        (f"{method}, {fraction:g}", cells[method, fraction])
        for fraction in fractions
        for method in methods
        if (method, fraction) in cells
    ] + [(_name(run), run.rows) for run in full]
    found = [[row_seconds(row) for row in rows] for _, rows in named]
    stages = [stage for stage in (*STAGES, TRAINING) if any(stage in row for rows in found for row in rows)]
    lines: list[list[object]] = []
    for (name, rows), seconds in zip(named, found, strict=True):
        parts = [_mean_stage([row[stage] for row in seconds if stage in row]) for stage in stages]
        lines.append([name, *parts, _seconds(_mean_seconds(rows))])
    titles = ["run", *(STAGES.get(stage, stage) for stage in stages), "sum"]
    caption = "Mean over seeds. Unknown stages are not part of the sum."
    if any("costs" not in row for _, rows in named for row in rows):
        caption += " Rows of earlier versions know only selection and training."
    numbers = table(caption, titles, lines)
    return tag("details", tag("summary", "Seconds of each stage"), numbers)


def _mean_stage(values: Sequence[float | None]) -> str:
    if not values:
        return ""
    known = [value for value in values if value is not None]
    return _seconds(statistics.fmean(known)) if len(known) == len(values) else "unknown"


def _render_settings(comparisons: Iterable[Comparison]) -> Safe:
    parts = []
    for number, comparison in enumerate(comparisons, 1):
        settings = comparison.section.settings
        rows: list[list[object]] = [["Data fingerprint", tag("code", settings["data"])]]
        rows.append(["steps", ", ".join(str(steps) for steps in comparison.steps)])
        rows += [[name, str(value)] for name, value in settings.items() if name not in _OMITTED and value is not None]
        parts.append(table(f"Comparison {number}", ["setting", "value"], rows, class_="provenance"))
    return render(parts)


def _name(run: FullRun) -> str:
    """Return the name of runs on all data, with what they share with the subsets."""
    epochs = counted(run.steps, "step") if run.epochs is None else counted(run.epochs, "epoch")
    if run.same_steps:
        return f"all data, same steps ({epochs})"
    if run.same_epochs:
        return f"all data, same epochs ({run.epochs:,})"
    return f"all data, {epochs}"


def _title(name: str, rows: Rows) -> str:
    return f"{name}: {_mean_top1(rows):.2f}%, {_seconds(_mean_seconds(rows))} s ({counted(len(rows), 'seed')})"


def _accuracy(rows: Rows) -> str:
    return f"{_mean_top1(rows):.2f}" + (f" ± {_deviation(rows):.2f}" if len(rows) > 1 else "")


def _mean_top1(rows: Rows) -> float:
    return statistics.fmean(row["test_top1"] for row in rows)


def _deviation(rows: Rows) -> float:
    return statistics.stdev(row["test_top1"] for row in rows) if len(rows) > 1 else 0.0


def _mean_seconds(rows: Rows) -> float:
    return statistics.fmean(known_seconds(row) for row in rows)


def _seconds(value: float) -> str:
    return f"{value:.2g}" if value < 10 else f"{value:,.0f}"
