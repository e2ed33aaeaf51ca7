"""The results of a study: what the rows say of each of its cells, beside the published values."""

from __future__ import annotations

import dataclasses
import math
import shlex
import statistics
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdfast.errors import UsageError
from kdfast.files import sha256_json
from kdfast.reproduction.axes import AXES, RECIPE_DEFAULTS, format_value
from kdfast.reproduction.cells import Cell
from kdfast.reproduction.published import FIGURES
from kdfast.reproduction.selection import compressed_epochs
from kdfast.reproduction.study import Study
from kdfast.sweep.summary import half_width

Rows = Sequence[Mapping[str, Any]]

_NOT_CONDITIONS = ("seed", "view_seed", "targets")

# How a value of an axis is named where several axes stand side by side; the others are named by their value alone.
_NAMES = {
    "fraction": "{} of the data", "alpha": "alpha {}", "temperature": "T {}", "ce_weight": "cross-entropy {}",
    "term_weight": "weight {}", "teacher": "teacher {}", "teacher_fraction": "teacher on {}",
    "match_steps_of": "steps of {}",
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """A cell, its rows, and its published value.

    Attributes:
        cell: The cell.
        rows: Its rows, one for each seed, alike in all but the seed; none for a cell that is open.
        figure: What is compared, `top1` or `top5`.
        published: The published value in percent, or None.
        published_recipe: Whether the rows were trained with the study's own number of epochs.
        left_out: Number of its rows that differ from `rows` in another setting than the seed.
    """

    cell: Cell
    rows: Rows
    figure: str
    published: float | None
    published_recipe: bool
    left_out: int

    @property
    def values(self) -> list[float]:
        """The test accuracy of each row, in percent."""
        return [row[f"test_{self.figure}"] for row in self.rows]

    @property
    def mean(self) -> float:
        """Mean over the seeds."""
        return statistics.fmean(self.values)

    @property
    def half_width(self) -> float:
        """Half the width of the 95% t-interval of the mean over seeds; NaN for fewer than two."""
        return half_width(np.array(self.values)) if self.rows else math.nan

    @property
    def difference(self) -> float | None:
        """Ours minus published in percentage points; None if either is missing, or the epochs are not the study's."""
        if not self.rows or self.published is None or not self.published_recipe:
            return None
        return self.mean - self.published


@dataclass(frozen=True)
class Results:
    """The results of a study on one data set and one number of epochs.

    Attributes:
        study: The study.
        dataset: Name of the data among the published values.
        figure: What is compared: `top5` if only such values are published for the data, else `top1`.
        epochs: Epochs to which the recipe was compressed, or None.
        cells: A result for each cell, in the order in which they run.
    """

    study: Study
    dataset: str
    figure: str
    epochs: int | None
    cells: tuple[Result, ...]

    @property
    def done(self) -> list[Result]:
        """The cells that have rows."""
        return [result for result in self.cells if result.rows]

    @property
    def open(self) -> list[Result]:
        """The cells without rows."""
        return [result for result in self.cells if not result.rows]

    @property
    def rows(self) -> list[Mapping[str, Any]]:
        """The rows of all cells, each once."""
        return list({row["key"]: row for result in self.cells for row in result.rows}.values())

    @property
    def left_out(self) -> int:
        """Number of rows that differ from the others of their cell in another setting than the seed."""
        return sum(result.left_out for result in self.cells)


def rows_of_data(rows: Rows, dataset: str, fingerprint: str | None = None) -> list[dict[str, Any]]:
    """Return the rows of one data set, under a name that may have been given after they were trained.

    Args:
        rows: Rows of results.jsonl.
        dataset: The name.
        fingerprint: Fingerprint of the data; None: that of the last row with the name, or, if none has it, of all rows.

    Raises:
        UsageError: No row has the name, and the rows are of several data sets.
    """
    if fingerprint is None:
        named = [row for row in rows if row["dataset"] == dataset]
        fingerprint, *others = {row["settings"]["data"] for row in named[-1:] or rows}
        if others:
            names = ", ".join(sorted({row["dataset"] for row in rows}))
            raise UsageError(f"`dataset` is {dataset!r}, and the rows are of several: pass one of {names}")
    return [{**row, "dataset": dataset} for row in rows if row["settings"]["data"] == fingerprint]


def collect(study: Study, rows: Rows, dataset: str, current: Container[str] = ()) -> list[Results]:
    """Arrange the rows of one data set by the cells of a study; rows of other cells are left out.

    Rows of a cell are comparable if they differ in the seed alone: not in the teacher's file, the dynamics or the
    precision. Only comparable ones are shown: those of `current`, else those like the last row.

    Args:
        study: The study.
        rows: Rows of results.jsonl of one data set, also of other studies.
        dataset: Name of the data among the published values.
        current: The conditions, see `conditions`, that the command at hand runs under.

    Returns:
        The results for each number of epochs that occurs, the study's own first, which is there even without rows.
    """
    known = {digest_cell(cell.to_dict()): cell for cell in study.cells}
    found: dict[int | None, dict[Cell, list[Mapping[str, Any]]]] = {None: {}}
    for row in rows:
        cell = known.get(digest_cell(row["cell"]))
        if cell is not None:
            found.setdefault(row["compressed_to"], {}).setdefault(cell, []).append(row)
    if len(found) > 1 and not found[None]:
        del found[None]
    published = study.published.get(dataset, {})
    figure = FIGURES[1] if published and not any(FIGURES[0] in values for values in published.values()) else FIGURES[0]
    collected = []
    for epochs, by_cell in sorted(found.items(), key=lambda item: (item[0] is not None, -(item[0] or 0))):
        _share_rows(study, by_cell, epochs)
        cells = []
        for cell in study.sorted():
            all_rows = by_cell.get(cell, [])
            shown = _comparable(all_rows, current)
            value = published.get(cell, {}).get(figure)
            cells.append(Result(cell, shown, figure, value, epochs is None, len(all_rows) - len(shown)))
        collected.append(Results(study, dataset, figure, epochs, tuple(cells)))
    return collected


def conditions(settings: Mapping[str, Any]) -> str:
    """Return the digest of a run's settings but its seed and where it gets the teacher's logits from."""
    return sha256_json({name: value for name, value in settings.items() if name not in _NOT_CONDITIONS})


def _comparable(rows: Rows, current: Container[str]) -> list[Mapping[str, Any]]:
    """Return the last row of each seed under the conditions of the last row, or of the last that are in `current`."""
    under = [conditions(row["settings"]) for row in rows]
    chosen = next((one for one in reversed(under) if one in current), under[-1] if under else "")
    by_seed = {row["seed"]: row for row, one in zip(rows, under, strict=True) if one == chosen}
    return [by_seed[seed] for seed in sorted(by_seed)]


def _share_rows(study: Study, by_cell: dict[Cell, list[Mapping[str, Any]]], epochs: int | None) -> None:
    """Give a cell without rows those of one that has the same epochs, and differs only in whose steps it matches.

    In a short schedule, the steps of several fractions are as many epochs, and one run serves them all.
    """
    for cell in study.cells:
        if cell in by_cell or cell.match_steps_of is None:
            continue
        for other in study.cells:
            if dataclasses.replace(other, match_steps_of=cell.match_steps_of) != cell or other not in by_cell:
                continue
            row = by_cell[other][-1]
            if row["epochs"] == compressed_epochs(study, cell, epochs, round(row["kept"] / cell.fraction)):
                by_cell[cell] = by_cell[other]
                break


def label(study: Study, cell: Cell, axes: Sequence[str]) -> str:
    """Return the name of a cell of a study among those that differ in these axes."""
    values = study.shown(cell)
    parts = []
    for name in axes:
        if name == "kd":
            parts.append("KD" if cell.kd else "no KD")
        elif name == "disjoint":
            parts.append("disjoint" if cell.disjoint else "")
        elif name == "method" and cell.fraction == 1:
            parts.append("")  # all data
        elif name == "fraction" and cell.fraction == 1:
            parts.append("all data")
        elif name in values:
            form = _NAMES.get(name, "{}" if name in AXES else f"{name} {{}}")
            parts.append(form.format(format_value(values[name])))
    return ", ".join(part for part in parts if part)


def left_out(count: int) -> str:
    """Return the sentence about so many rows that are not comparable with the others of their cell."""
    runs, differ = ("run is", "differs") if count == 1 else ("runs are", "differ")
    return f"{count} {runs} left out: more than the seed {differ} from the runs shown, such as teacher or precision."


def restriction(cell: Cell, axes: Sequence[str]) -> str:
    """Return the options of `kdfast reproduce` that restrict a study to a cell.

    Args:
        cell: The cell.
        axes: The axes in which the cells of the study differ.
    """
    values = {**dict(cell.recipe), **cell.axes()}
    if cell.fraction == 1 and cell.match_steps_of is None:
        values["match_steps_of"] = None
    if cell.kd and cell.term is None:
        values["term"] = None
    words = [["--set", f"{name}={format_value(values[name])}"] for name in axes if name in values]
    return " ".join(map(shlex.join, words))


def digest_cell(cell: Mapping[str, Any]) -> str:
    """Return the digest of a cell's dictionary; those of equal cells are equal, also where a recipe lacks defaults."""
    return sha256_json({**cell, "recipe": {**RECIPE_DEFAULTS, **cell["recipe"]}})
