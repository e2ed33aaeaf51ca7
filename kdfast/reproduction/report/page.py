"""The page of a study: chart, table of ours and published, open cells with their commands, recipe and machines."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from kdfast.report.markup import Safe, render, statistics_list, table, tag
from kdfast.report.page import check_page_path, render_page, write_page
from kdfast.reproduction.axes import format_value
from kdfast.reproduction.report.chart import draw_study
from kdfast.reproduction.report.picture import check_picture_path, draw_picture, write_picture
from kdfast.reproduction.report.results import Result, Results, Rows, digest_cell, label, left_out, restriction
from kdfast.reproduction.study import Study
from kdfast.sweep.charts import breakable, legend, line_sample
from kdfast.text import counted

PAGE, PICTURE = "report.html", "plot.svg"

_NOTE = (
    "Ours: mean over seeds; bars: its 95% t-interval, from three seeds on. Hollow marks: published values. Horizontal "
    "lines: runs that have no place on the axis."
)
_FIGURES = {"top1": "top-1 (%)", "top5": "top-5 (%)"}


def check_report_files(out: Path) -> None:
    """Check, before the work, that the page and the picture may be written. Writes nothing.

    Raises:
        OutputError: One of them exists, and kdfast did not write it.
    """
    check_page_path(out / PAGE)
    check_picture_path(out / PICTURE)


def write_report(found: Sequence[Results], out: Path, command: str) -> None:
    """Write report.html, and plot.svg if the study has a chart and there is something to draw; else delete it.

    Args:
        found: The results, as `collect` returns them.
        out: The folder.
        command: The `kdfast reproduce` command of the study, to which restrictions are added.

    Raises:
        OutputError: A file cannot be written, or would replace one that kdfast did not write.
    """
    check_report_files(out)
    study = found[0].study
    write_page(render_study_page(found, command), out / PAGE)
    drawn = draw_study(found[0])
    if drawn is None:
        (out / PICTURE).unlink(missing_ok=True)  # of another study, or of other rows
        return
    entries = [(name, line_sample(line)) for name, line in drawn.lines]
    schedule = "" if found[0].epochs is None else f", {_schedule(found[0])}"
    title = f"{study.title} ({found[0].dataset}{schedule})"
    write_picture(draw_picture(title, drawn.drawing, entries), out / PICTURE)


def render_study_page(found: Sequence[Results], command: str) -> str:
    """Return the HTML of the page.

    Args:
        found: The results, as `collect` returns them.
        command: The `kdfast reproduce` command of the study, to which restrictions are added.
    """
    study, dataset = found[0].study, found[0].dataset
    rows = [row for results in found for row in results.rows]
    sections: list[tuple[str, str, Safe | None]] = []
    for number, results in enumerate(found):
        title = "Results" if len(found) == 1 else f"Results, {_schedule(results)}"
        sections.append((f"results-{number}", title, _render_results(results)))
    sections.append(("open", "Open cells", _render_open(found[0], command)))
    sections.append(("teachers", "Teachers", _render_teachers(study, rows, dataset)))
    sections.append(("runs", "Runs", _render_runs(rows, study)))
    sections.append(("provenance", "Recipe and machines", _render_settings(study, rows)))
    return render_page(study.title, _render_statistics(found[0], rows), sections)


def _render_statistics(results: Results, rows: Rows) -> Safe:
    return statistics_list(
        [
            ("Data", results.dataset),
            ("Cells with a result", f"{len(results.done)} of {len(results.cells)}"),
            ("Runs", f"{len(rows):,}"),
            ("Seeds", f"{len({row['seed'] for row in rows})}"),
            ("Hours of training", _hours(sum(row["seconds"] for row in rows))),
        ]
    )


def _schedule(results: Results) -> str:
    return "the study's epochs" if results.epochs is None else f"compressed to {counted(results.epochs, 'epoch')}"


def _render_results(results: Results) -> Safe:
    study = results.study
    parts: list[Safe] = [tag("p", f"Source: {study.source}.")]
    if results.epochs is not None:
        parts.append(
            tag(
                "p",
                tag("strong", "Not the published recipe: "),
                f"the schedule was compressed from {study.epochs} to {counted(results.epochs, 'epoch')}, so no "
                "difference from the published values is shown.",
            )
        )
    if results.left_out:
        parts.append(tag("p", left_out(results.left_out)))
    drawn = draw_study(results)
    if drawn is not None:
        parts.append(tag("p", _NOTE, class_="note"))
        figure = tag("figure", drawn.drawing)
        entries = legend(drawn.lines, reference=False)
        parts.append(tag("div", figure, entries, class_="charts"))
    parts.append(_table(results))
    if study.reported:
        parts.append(tag("p", "Reported by the source without values, to be compared with the table:"))
        parts.append(tag("ul", [tag("li", sentence) for sentence in study.reported]))
    return render(parts)


def _table(results: Results) -> Safe:
    axes = results.study.varying()
    figure = _FIGURES[results.figure]
    titles = ["cell", f"ours, {figure}", "95% interval", "seeds", "published", "difference", "steps", "hours a run"]
    shown = [_table_row(results.study, result, axes) for result in results.cells]
    caption = "In the order of the runs. Hours: the training of one student, without what it shares with others."
    return table(caption, titles, shown, class_="study")


def _table_row(study: Study, result: Result, axes: Sequence[str]) -> list[object]:
    name = breakable(label(study, result.cell, axes) or "all runs")
    published = "" if result.published is None else f"{result.published:.2f}"
    if not result.rows:
        return [name, tag("em", "open"), "", "", published, "", "", ""]
    width = result.half_width
    interval = "" if math.isnan(width) else f"{result.mean - width:.2f} to {result.mean + width:.2f}"
    gap = "" if result.difference is None else f"{result.difference:+.2f}"
    hours = _hours(statistics.fmean(row["seconds"] for row in result.rows))
    steps = f"{result.rows[-1]['steps']:,}"
    return [name, f"{result.mean:.2f}", interval, f"{len(result.rows)}", published, gap, steps, hours]


def _render_open(results: Results, command: str) -> Safe | None:
    """Render the commands of cells without a result; None if there are none."""
    if not results.open:
        return None
    axes = results.study.varying()
    if results.epochs is not None:
        command = f"{command} --epochs {results.epochs}"
    text = "These cells have no result yet. One command runs all of them, or each has its own:"
    rows = [
        [label(results.study, result.cell, axes), tag("code", f"{command} {restriction(result.cell, axes)}")]
        for result in results.open
    ]
    commands = table("Commands of single cells", ["cell", "command"], rows, class_="provenance")
    return render(
        [
            tag("p", text),
            tag("p", tag("code", command)),
            tag("details", tag("summary", counted(len(rows), "open cell")), commands),
        ]
    )


def _render_teachers(study: Study, rows: Rows, dataset: str) -> Safe | None:
    published = study.teacher_top1.get(dataset, {})
    ours: dict[tuple[str, float], dict[float, None]] = {}
    for row in rows:
        if row["teacher_top1"] is not None:
            place = (row["cell"]["teacher"], row["cell"].get("teacher_fraction", 1.0))
            ours.setdefault(place, {})[row["teacher_top1"]] = None
    places = list(dict.fromkeys([*ours, *((net, 1.0) for net in published)]))
    if not places:
        return None
    lines = []
    for net, fraction in places:
        known = published.get(net) if fraction == 1 else None
        found = list(ours.get((net, fraction), ()))
        gap = f"{found[0] - known:+.2f}" if known is not None and len(found) == 1 else ""
        values = ", ".join(f"{value:.2f}" for value in found) or tag("em", "open")
        lines.append([net, f"{fraction:g}", values, "" if known is None else f"{known:.2f}", gap])
    titles = ["teacher", "share of the data", "ours, top-1 (%)", "published", "difference"]
    text = "A student's result depends on its teacher: compare these before the students."
    return render([tag("p", text), table("Test accuracy of the teachers", titles, lines)])


def _render_runs(rows: Rows, study: Study) -> Safe | None:
    if not rows:
        return None
    by_digest = {digest_cell(cell.to_dict()): cell for cell in study.cells}
    axes = study.varying()
    lines = [
        [
            label(study, by_digest[digest_cell(row["cell"])], axes),
            f"{row['seed']}",
            f"{row['test_top1']:.2f}",
            f"{row['epochs']:,}",
            f"{row['steps']:,}",
            _hours(row["seconds"]),
            row["precision"],
            tag("code", row["command"]),
        ]
        for row in rows
    ]
    titles = ["cell", "seed", "top-1 (%)", "epochs", "steps", "hours", "precision", "the same training as a command"]
    numbers = table("Every run", titles, lines, class_="provenance")
    return tag("details", tag("summary", counted(len(lines), "run")), numbers)


def _render_settings(study: Study, rows: Rows) -> Safe:
    recipe = [[name, format_value(value)] for name, value in study.recipe.items()]
    parts = [table("The study's recipe; further fields as for kdfast distill", ["setting", "value"], recipe,
                   class_="provenance")]  # fmt: skip
    machines: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        machine = row["machine"]
        place = (
            machine["host"], machine["device"], f"{machine['threads']}", row["precision"], row["kdfast"], row["torch"],
        )  # fmt: skip
        machines.setdefault(place, []).append(row["seconds"])
    if machines:
        lines = [[*place, f"{len(times):,}", _hours(sum(times))] for place, times in machines.items()]
        titles = ["machine", "device", "threads", "precision", "kdfast", "torch", "runs", "hours"]
        parts.append(table("Machines and versions", titles, lines, class_="provenance"))
    return render(parts)


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:.2g}" if hours < 10 else f"{hours:,.0f}"
