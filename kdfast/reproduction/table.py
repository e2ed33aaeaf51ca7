"""The table of a study in Markdown: ours beside the published figures, missing cells as open."""

from __future__ import annotations

import math
from pathlib import Path

from kdfast.files import atomic_write, check_replaceable
from kdfast.reproduction.axes import format_value
from kdfast.reproduction.report.results import Result, Results, left_out
from kdfast.text import counted

TABLE = "table.md"
OPEN = "open"
_FIRST_LINE = b"<!-- kdfast reproduce "


def table(results: Results) -> str:
    """Return the table in Markdown, a row for each cell."""
    study, epochs = results.study, results.epochs
    axes = study.varying()
    lines = [
        f"{_FIRST_LINE.decode()}{study.name} -->",
        f"# {study.title}",
        "",
        f"{study.source}; data {results.dataset}.",
        "",
    ]
    if epochs is not None:
        lines += [
            f"Not the published recipe: {counted(epochs, 'epoch')} in place of {study.epochs}. Nothing is subtracted.",
            "",
        ]
    if results.left_out:
        lines += [left_out(results.left_out), ""]
    figure = f"{results.figure[:3]}-{results.figure[3:]} (n)"
    titles = [*axes, figure, "95% interval", "published", "difference", "steps"]
    lines += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for result in results.cells:
        values = {**vars(result.cell), **dict(result.cell.recipe), "method": study.method_name(result.cell.method)}
        cells = ["" if values[name] is None else format_value(values[name]) for name in axes]
        lines.append("| " + " | ".join([*cells, *_figures(result)]) + " |")
    lines += ["", f"{len(results.done)} of {len(results.cells)} cells have a run.", ""]
    if study.reported:
        lines += ["Reported by the source without values:", "", *(f"- {line}" for line in study.reported), ""]
    return "\n".join(lines)


def check_table(folder: Path) -> None:
    """Check, before the work, that table.md may be written. Writes nothing.

    Raises:
        OutputError: It exists, and kdfast did not write it.
    """
    check_replaceable(folder / TABLE, _is_own)


def write_table(text: str, folder: Path) -> None:
    """Write table.md.

    Raises:
        OutputError: It cannot be written, or exists and kdfast did not write it.
    """
    check_table(folder)
    with atomic_write(folder / TABLE) as file:
        file.write(text.encode(errors="backslashreplace"))


def _figures(result: Result) -> list[str]:
    published = "" if result.published is None else f"{result.published:.2f}"
    if not result.rows:
        return [OPEN, "", published, "", ""]
    mean, width = result.mean, result.half_width
    interval = "" if math.isnan(width) else f"[{mean - width:.2f}, {mean + width:.2f}]"
    difference = "" if result.difference is None else f"{result.difference:+.2f}"
    return [f"{mean:.2f} ({len(result.rows)})", interval, published, difference, f"{result.rows[-1]['steps']}"]


def _is_own(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_FIRST_LINE)) == _FIRST_LINE
    except OSError:
        return False
