"""Studies: a figure or table of a paper, its cells, published values and chart; `study_file` reads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kdfast.reproduction.axes import AXES, RECIPE_DEFAULTS, RECIPE_FIELDS, Values, format_value
from kdfast.reproduction.cells import Cell, resolve

_MAY_LACK = ("alpha", "temperature", "teacher", "teacher_fraction", "term_weight")


@dataclass(frozen=True)
class Plot:
    """The chart of a study: its horizontal axis, and the axes that tell its lines apart."""

    x: str
    lines: tuple[str, ...]

    def has_place(self, cell: Cell) -> bool:
        """Return whether a cell is a mark; others, such as all data beside the fraction kept, are lines across."""
        if cell.match_steps_of is not None or (self.x == "fraction" and cell.fraction == 1):
            return False
        return cell.value(self.x) is not None or (self.x == "term" and cell.kd)


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
        name: Name of its file, without the suffix.
        title: Its title.
        source: What it reproduces.
        cells: Its cells, in the order of the file.
        order: The axes by which runs are ordered.
        recipe: Recipe fields of the students.
        teachers: Recipe fields of teachers that are trained for it: those of `recipe`, and what the file changes.
        dynamics: `net`, fields of `RecordingConfig` and recipe fields of the recording.
        cache_views: Views of the teacher's cache that methods read.
        published: By kind of data and cell: figures in percent by `top1` and `top5`.
        teacher_top1: By kind of data and network: the paper's top-1 of a teacher trained on all data, in percent.
        reported: What the paper reports without values, a sentence each.
        plot: The chart, or None.
        samples: Training samples of the paper's data.
        argument: How `load_study` is asked for it: its name, or the path of its file.
    """

    name: str
    title: str
    source: str
    cells: tuple[Cell, ...]
    order: tuple[str, ...]
    recipe: Values
    teachers: Values
    dynamics: dict[str, Any]
    cache_views: int
    published: dict[str, dict[Cell, dict[str, float]]]
    teacher_top1: dict[str, dict[str, float]]
    reported: tuple[str, ...]
    plot: Plot | None
    samples: int
    argument: str

    @property
    def epochs(self) -> int:
        """Epochs of its recipe."""
        return int(self.recipe.get("epochs") or RECIPE_DEFAULTS["epochs"])

    @property
    def images(self) -> int:
        """Images that one seed of all cells trains on, on the paper's data."""
        return sum(round(self.samples * cell.fraction) * cell.epochs(self.samples) for cell in self.cells)

    def varying(self) -> tuple[str, ...]:
        """Return the axes and recipe fields in which the cells differ, in the order of `AXES`."""
        rows = [{**dict(cell.recipe), **{name: getattr(cell, name) for name in AXES}} for cell in self.cells]
        found = []
        for name in (*AXES, *RECIPE_FIELDS):
            # Without the teacher, its axes have no value; no term and no weight are values of runs with it.
            values = {row.get(name) for row in rows if row["kd"] or name not in ("ce_weight", "term")}
            if len(values - {None} if name in _MAY_LACK else values) > 1:
                found.append(name)
        return tuple(found)

    def label(self, cell: Cell) -> str:
        """Return a cell for people: the axes in which the study's cells differ, where they have a value."""
        values = self.shown(cell)
        shown = [f"{name}={format_value(values[name])}" for name in self.varying() if name in values]
        return " ".join(shown) or str(cell)

    def shown(self, cell: Cell) -> Values:
        """Return the axes and recipe fields of a cell that people read: those with an effect."""
        recipe = {name: value for name, value in cell.recipe if value}
        return {**recipe, **cell.axes(), "method": self.method_name(cell.method)}

    def method_name(self, method: str) -> str:
        """Return the name of a method, with its rule if the study has others for the same score."""
        others = any(cell.method.startswith(f"{method}/") for cell in self.cells)
        return f"{method}/{resolve(method).method.rule}" if others else method

    def sorted(self) -> list[Cell]:
        """Return the cells in the order in which they are run."""
        ranks: dict[str, dict[Any, int]] = {name: {} for name in self.order}
        for cell in self.cells:
            for name in self.order:
                ranks[name].setdefault(_place(cell, name), len(ranks[name]))
        return sorted(
            self.cells,
            key=lambda cell: (
                [ranks[name][_place(cell, name)] for name in self.order],
                cell.match_steps_of is not None,
            ),
        )


def _place(cell: Cell, name: str) -> Any:
    if name == "fraction" and cell.match_steps_of is not None:
        return cell.match_steps_of
    return cell.value(name)
