"""Published values of a study file: top-1 and top-5 of cells and of teachers, in percent."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.errors import UsageError
from kdfast.reproduction.axes import Values, locate_errors
from kdfast.reproduction.cells import Cell, expand

FIGURES = ("top1", "top5")


def read_published(
    published: Mapping[str, Any], base: Values, cells: Mapping[Cell, None], path: Path
) -> dict[str, dict[Cell, dict[str, float]]]:
    """Return the published values by kind of data and cell: figures in percent by `top1` and `top5`.

    Args:
        published: The key `published` of the file.
        base: What completes an entry: the file's recipe and defaults.
        cells: The cells of the study.
        path: The file, for errors.

    Raises:
        UsageError: An entry is wrong, names no cell of the study, or one that another entry names.
    """
    found: dict[str, dict[Cell, dict[str, float]]] = {}
    for kind, entries in published.items():
        figures_of = found.setdefault(str(kind), {})
        for number, entry in enumerate(entries if isinstance(entries, list) else [entries], 1):
            where = f"{path}, published, {kind}, entry {number}"
            with locate_errors(where):
                values = _read_entry(entry, base)
            for cell, figures in values:
                if cell not in cells:
                    raise UsageError(f"{where}: no cell of the study is {cell}: add the cell, or correct the entry")
                if cell in figures_of:
                    raise UsageError(f"{where}: the cell {cell} has a published value already: write it once")
                figures_of[cell] = figures
    return found


def _read_entry(entry: Any, base: Values) -> list[tuple[Cell, dict[str, float]]]:
    if not isinstance(entry, dict) or not any(name in entry for name in FIGURES):
        raise UsageError(f"it is {entry!r}: write the axes of one cell, and top1 or top5")
    axes = {name: value for name, value in entry.items() if name not in (*FIGURES, "note")}
    if sum(isinstance(value, list) for value in axes.values()) > 1:
        raise UsageError("it has two lists of values: write an entry for each value of one of them")
    cells = list(expand(axes, base))
    figures: list[dict[str, float]] = [{} for _ in cells]
    for name in FIGURES:
        if name not in entry:
            continue
        given = entry[name] if isinstance(entry[name], list) else [entry[name]]
        if len(given) != len(cells):
            raise UsageError(f"it has {len(cells)} cells and {len(given)} values of {name}: write one for each cell")
        for place, value in zip(figures, given, strict=True):
            place[name] = _percent(name, value)
    return list(zip(cells, figures, strict=True))


def _percent(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
        raise UsageError(f"`{name}` is {value!r}: write a number of percent")
    if 0 < value < 1:
        raise UsageError(f"`{name}` is {value!r}: write percent, such as {100 * value:g} for {value!r}")
    return float(value)


def read_teachers(given: Mapping[str, Any], path: Path) -> dict[str, dict[str, float]]:
    """Return the top-1 of the paper's teachers in percent, by kind of data and network; `given` is `teacher_top1`.

    Raises:
        UsageError: It is not of that form.
    """
    found = {}
    for kind, networks in given.items():
        if not isinstance(networks, dict):
            raise UsageError(f"{path}, teacher_top1, {kind}, is {networks!r}: write percent by network")
        with locate_errors(f"{path}, teacher_top1, {kind}"):
            found[str(kind)] = {str(net): _percent(str(net), top1) for net, top1 in networks.items()}
    return found
