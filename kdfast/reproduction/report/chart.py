"""The chart of a study: our accuracy with intervals, published values as hollow marks."""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.report.markup import Safe
from kdfast.reproduction.axes import Value, format_value
from kdfast.reproduction.report.results import Result, Results, label
from kdfast.reproduction.study import Plot, Study
from kdfast.sweep.charts import Axis, Line, Mark, Reference, chart
from kdfast.text import counted

_RADIUS, _HOLLOW_RADIUS = 3.6, 4.8
_SEEDS = 3  # the t-interval of two seeds is thirteen standard deviations wide: too wide to draw
_AXIS_NAMES = {
    "fraction": "share of the training split kept", "teacher_fraction": "share of the training split of the teacher",
    "alpha": "weight of the teacher", "temperature": "temperature", "term": "further term of the loss",
    "teacher": "teacher", "student": "student", "method": "method",
}  # fmt: skip
_FIGURES = {"top1": "test top-1 (%)", "top5": "test top-5 (%)"}


@dataclass(frozen=True)
class StudyChart:
    """A chart, and the names of its lines."""

    drawing: Safe
    lines: tuple[tuple[str, Line], ...]
    has_references: bool


def draw_study(results: Results) -> StudyChart | None:
    """Draw the results as the study's `plot` says; None if it has none, or there is nothing to draw.

    Cells without a value on the horizontal axis, and all data where it is the fraction kept, are horizontal lines.
    Training on all data for the steps of a fraction has no place on another axis.
    """
    plot = results.study.plot
    if plot is None:
        return None
    points = [result for result in results.cells if plot.has_place(result.cell)]
    values = list(dict.fromkeys(result.cell.value(plot.x) for result in points if _is_known(result)))
    if not values:
        return None
    numeric = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    if numeric:
        axis = Axis.of_values(sorted(float(value) for value in values))  # type: ignore[arg-type]
        places: dict[Value, float] = {value: float(value) for value in values}  # type: ignore[arg-type]
    else:
        axis = Axis.of_names([_name(results.study, plot.x, value) for value in values])
        places = {value: float(place) for place, value in enumerate(values)}
    lines = _lines(results.study, points, plot, places)
    references = [
        Reference(result.mean, label(results.study, result.cell, _naming(results, plot)))
        for result in results.done
        if not plot.has_place(result.cell) and (result.cell.match_steps_of is None or plot.x == "fraction")
    ]
    across = _AXIS_NAMES.get(plot.x, plot.x) + (", logarithmic" if axis.log else "")
    drawing = chart(
        [line for _, line in lines], references, axis, across, f"{results.study.title}, {results.dataset}",
        value_name=_FIGURES[results.figure],
    )  # fmt: skip
    return StudyChart(drawing, tuple(_entries(lines)), bool(references))


def _lines(study: Study, points: list[Result], plot: Plot, places: dict[Value, float]) -> list[tuple[str, Line]]:
    """Return a line of our values and one of the published values for each combination of the axes of lines."""
    groups: dict[tuple[Value, ...], list[Result]] = {}
    for result in points:
        if _is_known(result):
            groups.setdefault(tuple(result.cell.value(name) for name in plot.lines), []).append(result)
    without_kd = [name for name in plot.lines if name != "kd"]
    numbers: dict[tuple[Value, ...], int] = {}
    lines = []
    for group in groups.values():
        cell = group[0].cell
        number = numbers.setdefault(tuple(cell.value(name) for name in without_kd), len(numbers))
        dashed = "kd" in plot.lines and not cell.kd
        name = label(study, cell, plot.lines) or "all"
        ordered = sorted(group, key=lambda result: places[result.cell.value(plot.x)])
        ours = [_mark(study, result, places, plot) for result in ordered if result.rows]
        theirs = [
            Mark(places[r.cell.value(plot.x)], r.published, 0.0, _HOLLOW_RADIUS, f"published {r.published:g}")
            for r in ordered
            if r.published is not None
        ]
        lines.append((name, Line(number, ours, dashed=dashed)))
        lines.append((f"{name}, published", Line(number, theirs, joined=False, hollow=True)))
    return lines


def _entries(lines: list[tuple[str, Line]]) -> list[tuple[str, Line]]:
    """Return the entries of the legend: a line for each name, and one entry for all published values."""
    ours = [(name, line) for name, line in lines if not line.hollow]
    if any(line.marks for _, line in lines if line.hollow):
        ours.append(("published", Line(0, joined=False, hollow=True)))
    return ours


def _mark(study: Study, result: Result, places: dict[Value, float], plot: Plot) -> Mark:
    spread = result.half_width if len(result.rows) >= _SEEDS else 0.0
    seeds = counted(len(result.rows), "seed")
    title = f"{label(study, result.cell, (plot.x, *plot.lines))}: {result.mean:.2f} ({seeds})"
    return Mark(places[result.cell.value(plot.x)], result.mean, spread, _RADIUS, title)


def _is_known(result: Result) -> bool:
    return bool(result.rows) or result.published is not None


def _naming(results: Results, plot: Plot) -> list[str]:
    """Return the axes that name a horizontal line: those in which cells differ, but the horizontal axis."""
    return [name for name in results.study.varying() if name != plot.x or name == "fraction"]


def _name(study: Study, axis: str, value: Value) -> str:
    if axis == "method":
        return study.method_name(str(value))
    if axis in ("teacher", "student"):
        return format_value(value).replace("resnet", "RN")
    return "no term" if axis == "term" and value is None else format_value(value)
