"""The rows of a study, and its table in Markdown: ours beside the published figures, missing cells as open."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kdfast.files import atomic_write, check_replaceable
from kdfast.reproduction.axes import format_value
from kdfast.reproduction.cells import Cell
from kdfast.reproduction.study import Study
from kdfast.sweep.summary import half_width

TABLE = "table.md"
OPEN = "open"
_FIRST_LINE = b"<!-- kdfast reproduce "


@dataclass(frozen=True)
class CellResult:
    """What is known of one cell.

    Attributes:
        cell: The cell.
        rows: Its rows by seed; empty for a cell that is open.
        published: The published top-1 in percent, or None.
    """

    cell: Cell
    rows: dict[int, Mapping[str, Any]]
    published: float | None

    @property
    def top1(self) -> list[float]:
        """Test top-1 in percent, by ascending seed."""
        return [float(self.rows[seed]["test_top1"]) for seed in sorted(self.rows)]

    @property
    def mean(self) -> float | None:
        """Mean of `top1`; None for a cell that is open."""
        return statistics.fmean(self.top1) if self.rows else None

    @property
    def half_width(self) -> float | None:
        """Half the width of the 95% t-interval of the mean; None for fewer than two seeds."""
        width = half_width(np.array(self.top1)) if len(self.rows) > 1 else math.nan
        return None if math.isnan(width) else width


def rows_of(study: Study, rows: Iterable[Mapping[str, Any]], *, dataset: str, epochs: int | None) -> list[CellResult]:
    """Arrange the rows of a study's cells; those of other studies with equal cells count too.

    Args:
        study: The study.
        rows: Rows of results.jsonl, in order; of two of one cell and seed, the last counts.
        dataset: Name of the data among the published values.
        epochs: The value of `epochs` that the rows were run with; None: the recipe's.

    Returns:
        One result for each cell, in the order of the runs. With `epochs`, none has a published value, because the
        recipe is another one.
    """
    found: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        if row["dataset"] == dataset and row["compressed_to"] == epochs:
            found.setdefault(_key(row["cell"]), {})[row["seed"]] = row
    published = study.published.get(dataset, {}) if epochs is None else {}
    return [
        CellResult(cell, found.get(_key(cell.to_dict()), {}), published.get(cell, {}).get("top1"))
        for cell in study.sorted()
    ]


def table(study: Study, results: Sequence[CellResult], *, dataset: str, epochs: int | None) -> str:
    """Return the table in Markdown; arguments as for `rows_of`, whose results these are."""
    axes = study.varying()
    lines = [f"{_FIRST_LINE.decode()}{study.name} -->", f"# {study.title}", "", f"{study.source}; data {dataset}.", ""]
    if epochs is not None:
        recipe = study.recipe.get("epochs") or 240
        lines += [f"Not the published recipe: {epochs} epochs in place of {recipe}. Nothing is subtracted.", ""]
    lines.append("| " + " | ".join([*axes, "top-1 (n)", "95% interval", "published", "difference"]) + " |")
    lines.append("|" + "---|" * (len(axes) + 4))
    for result in results:
        values = {**dict(result.cell.recipe), **{name: getattr(result.cell, name, None) for name in axes}}
        cells = ["" if values.get(name) is None else format_value(values[name]) for name in axes]
        lines.append("| " + " | ".join([*cells, *_figures(result)]) + " |")
    done = sum(bool(result.rows) for result in results)
    return "\n".join([*lines, "", f"{done} of {len(results)} cells have a run.", ""])


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


def _figures(result: CellResult) -> list[str]:
    published = "" if result.published is None else f"{result.published:.2f}"
    mean, width = result.mean, result.half_width
    if mean is None:
        return [OPEN, "", published, ""]
    interval = "" if width is None else f"[{mean - width:.2f}, {mean + width:.2f}]"
    difference = "" if result.published is None else f"{mean - result.published:+.2f}"
    return [f"{mean:.2f} ({len(result.rows)})", interval, published, difference]


def _is_own(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_FIRST_LINE)) == _FIRST_LINE
    except OSError:
        return False


def _key(cell: Mapping[str, Any]) -> str:
    return json.dumps(cell, sort_keys=True)
