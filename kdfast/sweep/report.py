"""The table, the plot and the page of a sweep, made from results.jsonl alone."""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kdfast.errors import DataError
from kdfast.files import atomic_write, check_replaceable
from kdfast.report.page import check_page_path, write_page
from kdfast.report.plots import add_legend, check_plot_path, save_plot
from kdfast.sweep.page import render_sweep_page
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.summary import BASELINE, Difference, Section, group_rows
from kdfast.text import counted, printable

TABLE, PLOT, PAGE = "table.md", "plot.png", "report.html"

# The first line of a table: its common settings, and the start of the data's fingerprint.
_FIRST_LINE = re.compile(rb"\*\*student .*, steps .*\*\* \(data [0-9a-f]{12}\)$")
_FIRST_LINE_BYTES = 4096
# What Markdown reads as markup; an underscore only where it does not join words.
_MARKUP = re.compile(r"[\\`*|<$]|(?<![^\W_])_|_(?![^\W_])")

_SHOWN = (
    "student", "steps", "batch_size", "lr", "schedule", "precision", "ce", "alpha", "temperature", "terms",
    "terms_warmup_epochs", "views", "optimizer", "label_smoothing", "ema", "clip", "augment", "mixup", "cutmix",
)  # fmt: skip


def report_sweep(folder: Path) -> str:
    """Write table.md, plot.png and report.html from the rows of a sweep.

    Args:
        folder: Folder of the sweep.

    Returns:
        The table, in Markdown.

    Raises:
        DataError: There is no row.
        OutputError: The files cannot be written, or would replace some that kdfast did not write.
    """
    sections = group_rows(ResultsLog(folder).results())
    if not sections:
        raise DataError(f"{folder} has no row of a sweep: pass as `out` the folder of a sweep with a finished run")
    check_report_files(folder)
    text = "\n".join(table(section) for section in sections)
    with atomic_write(folder / TABLE) as file:
        file.write(text.encode(errors="backslashreplace"))
    plot(sections, folder / PLOT)
    write_page(render_sweep_page(folder.resolve().name, sections), folder / PAGE)
    return text


def check_report_files(folder: Path) -> None:
    """Check, before the work, that table.md, plot.png and report.html may be written. Writes nothing.

    Raises:
        OutputError: One of them exists, and kdfast did not write it.
    """
    check_replaceable(folder / TABLE, _is_own_table)
    check_plot_path(folder / PLOT)
    check_page_path(folder / PAGE)


def table(section: Section) -> str:
    """Return a section in Markdown: a table with the teacher, one without it, and the ranking per fraction.

    A cell contains the mean test top-1 in percent ± its standard deviation over seeds (number of seeds), and the paired
    difference from random with its 95% t-interval.
    """
    facts = ", ".join(_fact(name, section.settings[name]) for name in _SHOWN if name in section.settings)
    kept = {row["fraction"]: row["kept"] for row in section.rows}
    lines = [f"**{facts}** (data {str(section.settings['data'])[:12]})", ""]
    if section.left_out:
        runs = counted(section.left_out, "run")
        lines += [f"Left out: {runs} with other inputs or another length than the last run of the method.", ""]
    for kd in (True, False):
        fractions = [f for f in section.fractions if any((m, f, kd) in section.top1 for m in section.methods)]
        if not fractions:
            continue
        heads = [f"{fraction:g} ({kept[fraction]} kept) | to random" for fraction in fractions]
        lines.append(f"| {'with the teacher (KD)' if kd else 'without the teacher'} | " + " | ".join(heads) + " |")
        lines.append("|---|" + "---|---|" * len(fractions))
        lines += [_table_row(section, method, fractions, kd) for method in section.methods]
        lines.append("")
        lines += [*(_ranking_line(section, fraction, kd) for fraction in fractions), ""]
    return "\n".join(lines)


def plot(sections: Sequence[Section], out: Path) -> None:
    """Plot accuracy against the kept fraction: one color per method, solid with the teacher and dashed without it.

    Args:
        sections: The sections, one panel each.
        out: The .png file to write.

    Raises:
        OutputError: The file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7 * len(sections), 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(sections), squeeze=False)[0]
    for panel, section in zip(panels, sections, strict=True):
        _plot_section(panel, section)
        facts = f"{section.settings['student']}, {section.settings['steps']} steps"
        title = f"{facts}; solid: with the teacher, dashed: without; bars: sd over seeds"
        panel.set_title(printable(title), fontsize=10, parse_math=False)
    save_plot(figure, out)


def _table_row(section: Section, method: str, fractions: Sequence[float], kd: bool) -> str:
    cells = [_escape(method)]
    for fraction in fractions:
        seeds = section.top1.get((method, fraction, kd))
        if seeds is None:
            cells += ["", ""]
            continue
        mean = f"{statistics.fmean(seeds.values()):.2f}"
        best = _ranking(section, fraction, kd)[0] == method
        spread = f" ± {statistics.stdev(seeds.values()):.2f}" if len(seeds) > 1 else ""
        cells.append(f"{f'**{mean}**' if best else mean}{spread} ({len(seeds)})")
        cells.append(_format_difference(section.difference(method, fraction, kd)))
    return "| " + " | ".join(cells) + " |"


def _is_own_table(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return _FIRST_LINE.match(file.readline(_FIRST_LINE_BYTES)) is not None
    except OSError:
        return False


def _fact(name: str, value: Any) -> str:
    """Return a setting and its value; each term of the loss as `weight name (option=value, ...)`."""
    if name != "terms":
        return f"{name} {_escape(value)}"
    terms = []
    for term in value:
        options = ", ".join(f"{option}={number:g}" for option, number in term["options"].items())
        terms.append(f"{term['weight']:g} {term['name']}{f' ({options})' if options else ''}")
    return f"terms {_escape(' + '.join(terms))}"


def _escape(name: object) -> str:
    """Return a name that Markdown shows literally, on one line of a table."""
    return _MARKUP.sub(r"\\\g<0>", printable(str(name)).replace("\n", " "))


def _ranking_line(section: Section, fraction: float, kd: bool) -> str:
    """Return the place of random among the methods, and which methods differ clearly from it."""
    order = _ranking(section, fraction, kd)
    names = {name: _escape(name) for name in order}
    first = names[order[0]]
    where = f"- {fraction:g}, {'KD' if kd else 'plain'}:"
    if len(order) == 1:
        return f"{where} {first} alone."
    if BASELINE not in order:
        return f"{where} {', '.join(names.values())}, from first to last."
    gaps = {name: section.difference(name, fraction, kd) for name in order}
    above = [names[name] for name, gap in gaps.items() if gap is not None and gap.is_significant and gap.mean > 0]
    below = [names[name] for name, gap in gaps.items() if gap is not None and gap.is_significant and gap.mean < 0]
    if all(gap is None or gap.n < 2 for gap in gaps.values()):
        return f"{where} {', '.join(names.values())}, from first to last (one seed: no interval)."
    alone = [names[name] for name, gap in gaps.items() if name != BASELINE and (gap is None or gap.n < 2)]
    unclear = f"; of too few seeds to say: {', '.join(alone)}" if alone else ""
    return (
        f"{where} {BASELINE} is number {order.index(BASELINE) + 1} of {len(order)}, {first} is first; "
        f"clearly better than {BASELINE}: {', '.join(above) or 'none'}; "
        f"clearly worse: {', '.join(below) or 'none'}{unclear}."
    )


def _ranking(section: Section, fraction: float, kd: bool) -> list[str]:
    """Return the methods by descending mean accuracy."""
    means = {m: statistics.fmean(s.values()) for (m, f, k), s in section.top1.items() if (f, k) == (fraction, kd)}
    return sorted(means, key=lambda name: -means[name])


def _plot_section(panel: Any, section: Section) -> None:
    lines: dict[str, Any] = {}
    for number, method in enumerate(section.methods):
        color = f"C{number % 10}"
        for kd, style in ((True, "-"), (False, "--")):
            points = {f: section.top1[method, f, kd] for f in section.fractions if (method, f, kd) in section.top1}
            if not points:
                continue
            values = [list(seeds.values()) for seeds in points.values()]
            means = [statistics.fmean(v) for v in values]
            marks: dict[str, Any] = {"linestyle": style, "marker": "o", "markersize": 4}
            (line,) = panel.plot(list(points), means, linewidth=1.5, color=color, **marks)
            lines.setdefault(method, line)
            bars = [(f, m, statistics.stdev(v)) for f, m, v in zip(points, means, values, strict=True) if len(v) > 1]
            for fraction, mean, deviation in bars:
                panel.errorbar(fraction, mean, yerr=deviation, color=color, linewidth=1, capsize=3)
    panel.set_xticks(section.fractions)
    panel.set(xlabel="share of the training split kept", ylabel="test top-1 (%)")
    panel.grid(alpha=0.3)
    add_legend(panel, lines)


def _format_difference(gap: Difference | None) -> str:
    if gap is None:
        return ""
    if gap.n < 2:
        return f"{gap.mean:+.2f}"
    return f"{gap.mean:+.2f} [{gap.mean - gap.half_width:+.2f}, {gap.mean + gap.half_width:+.2f}]"
