"""The results of a study: what the rows say of each of its cells, beside the published values."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kdfast.errors import UsageError
from kdfast.files import sha256_json
from kdfast.reproduction.axes import AXES, RECIPE_DEFAULTS, format_value
from kdfast.reproduction.cells import Cell
from kdfast.reproduction.study import FIGURES, Study
from kdfast.sweep.summary import half_width

Rows = Sequence[Mapping[str, Any]]

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
        rows: Its rows, one for each seed; none for a cell that is open.
        figure: What is compared, `top1` or `top5`.
        published: The published value in percent, or None.
        published_recipe: Whether the rows were trained with the study's own number of epochs.
    """

    cell: Cell
    rows: Rows
    figure: str
    published: float | None
    published_recipe: bool

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
        """The rows of all cells."""
        return [row for result in self.cells for row in result.rows]


def name_data(rows: Rows, dataset: str, fingerprint: str | None = None) -> list[dict[str, Any]]:
    """Return rows, those of one data set under another name, which may have been given after they were trained.

    Args:
        rows: Rows of results.jsonl.
        dataset: The name.
        fingerprint: Fingerprint of the data; None: of all rows, if they have the same and none has the name.

    Raises:
        UsageError: No row has the name, and the rows are of several data sets.
    """
    if fingerprint is None:
        names = sorted({row["dataset"] for row in rows})
        if dataset in names:
            return list(map(dict, rows))
        fingerprint, *others = {row["settings"]["data"] for row in rows}
        if others:
            raise UsageError(f"`dataset` is {dataset!r}, and the rows are of several: pass one of {', '.join(names)}")
    return [{**row, "dataset": dataset} if row["settings"]["data"] == fingerprint else dict(row) for row in rows]


def collect(study: Study, rows: Rows, dataset: str) -> list[Results]:
    """Arrange rows by the cells of a study; rows of other cells and other data are left out.

    Args:
        study: The study.
        rows: Rows of results.jsonl, also of other studies. Of two rows of one cell and seed, the last counts.
        dataset: Name of the data among the published values.

    Returns:
        The results for each number of epochs that occurs, the study's own first, which is there even without rows.
    """
    known = {digest_cell(cell.to_dict()) for cell in study.cells}
    found: dict[int | None, dict[str, dict[int, Mapping[str, Any]]]] = {None: {}}
    for row in rows:
        digest = digest_cell(row["cell"])
        if row["dataset"] == dataset and digest in known:
            found.setdefault(row["compressed_to"], {}).setdefault(digest, {})[row["seed"]] = row
    if len(found) > 1 and not found[None]:
        del found[None]
    published = study.published.get(dataset, {})
    figure = FIGURES[1] if published and not any(FIGURES[0] in values for values in published.values()) else FIGURES[0]
    return [
        Results(study, dataset, figure, epochs, tuple(_result(cell, by_cell, figure, published, epochs)
                                                      for cell in study.sorted()))
        for epochs, by_cell in sorted(found.items(), key=lambda item: (item[0] is not None, -(item[0] or 0)))
    ]  # fmt: skip


def label(cell: Cell, axes: Sequence[str]) -> str:
    """Return the name of a cell among those that differ in these axes."""
    values = {**dict(cell.recipe), **cell.axes()}
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


def restriction(cell: Cell, axes: Sequence[str]) -> str:
    """Return the options of `kdfast reproduce` that restrict a study to a cell.

    Args:
        cell: The cell.
        axes: The axes in which the cells of the study differ.
    """
    values = {**RECIPE_DEFAULTS, **dict(cell.recipe), **cell.axes()}
    if cell.fraction == 1 and cell.match_steps_of is None:
        values["match_steps_of"] = None
    if cell.kd and cell.term is None:
        values["term"] = None
    words = [["--set", f"{name}={format_value(values[name])}"] for name in axes if name in values]
    return " ".join(map(shlex.join, words))


def _result(
    cell: Cell,
    by_cell: Mapping[str, Mapping[int, Mapping[str, Any]]],
    figure: str,
    published: Mapping[Cell, Mapping[str, float]],
    epochs: int | None,
) -> Result:
    rows = by_cell.get(digest_cell(cell.to_dict()), {})
    value = published.get(cell, {}).get(figure)
    return Result(cell, [rows[seed] for seed in sorted(rows)], figure, value, epochs is None)


def digest_cell(cell: Mapping[str, Any]) -> str:
    """Return the digest of a cell's dictionary; equal cells have equal digests."""
    return sha256_json(dict(cell))
