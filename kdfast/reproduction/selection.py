"""Which cells of a study to run: restrictions by axis, and the schedule by `epochs`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from kdfast.errors import UsageError, unknown_name
from kdfast.reproduction.axes import AXES, RECIPE_FIELDS, Value, format_value, parse_text
from kdfast.reproduction.cells import Cell, resolve
from kdfast.reproduction.study import Study
from kdfast.sweep.spec import parse_methods

# Axes without effect in runs without the teacher, which a restriction of these axes therefore keeps.
_OF_TEACHER = ("alpha", "temperature", "ce_weight", "term", "term_weight", "teacher", "teacher_fraction")


def parse_restrictions(texts: Sequence[str]) -> dict[str, tuple[Value, ...]]:
    """Parse `AXIS=VALUE` or `AXIS=VALUE,VALUE`, each axis once; a method with options takes the rest of the text.

    Raises:
        UsageError: A text is not of that form, an axis is named twice, or a value is not accepted.
    """
    found: dict[str, tuple[Value, ...]] = {}
    for text in texts:
        name, equals, rest = text.partition("=")
        if not (name and equals and rest) or name in found:
            raise UsageError(f"`restrict` is {text!r}: write AXIS=VALUE or AXIS=VALUE,VALUE, each axis once")
        found[name] = parse_values(name, rest)
    return found


def parse_values(name: str, text: str) -> tuple[Value, ...]:
    """Parse comma-separated values of an axis.

    Raises:
        UsageError: A value is not accepted.
    """
    if name == "method":
        return tuple(str(resolve(str(spec))) for spec in parse_methods(text))
    # Options of a term, such as beta=2 of dkd:alpha=1,beta=2, have commas between them, too.
    words = re.split(r",(?![^,:]*=)" if name == "term" else ",", text)
    return tuple(parse_text(name, word.strip()) for word in words)


def select_cells(
    study: Study,
    restrict: Mapping[str, Sequence[Value]],
    *,
    fractions: Sequence[float] | None = None,
    methods: Sequence[str] | None = None,
) -> list[Cell]:
    """Return the cells to run, in their order.

    Args:
        study: The study.
        restrict: Allowed values by axis or recipe field. Runs without the teacher stay where an axis concerns only
            those with it.
        fractions: Allowed fractions; runs on all data stay, but those that match the steps of another fraction.
        methods: Allowed methods; runs on all data stay.

    Raises:
        UsageError: There is no such axis, no cell has such a value, or no cell is left.
    """
    cells = study.sorted()
    for name, values in restrict.items():
        _check_values(study, name, values)
        cells = [c for c in cells if c.value(name) in values or (not c.kd and name in _OF_TEACHER)]
    if fractions is not None:
        _check_values(study, "fraction", fractions)
        cells = [
            c
            for c in cells
            if (c.match_steps_of or c.fraction) in fractions or (c.fraction == 1 and not c.match_steps_of)
        ]
    if methods is not None:
        _check_values(study, "method", methods)
        cells = [c for c in cells if c.method in methods or c.fraction == 1]
    if not cells:
        raise UsageError(f"no cell of {study.name} has all these values: allow more of them")
    return cells


def compressed_epochs(study: Study, cell: Cell, epochs: int | None, samples: int) -> int:
    """Return the epochs of a cell's runs.

    Args:
        study: The study.
        cell: The cell.
        epochs: Epochs in place of the recipe's; those of other schedules of the study change by the same factor.
        samples: Number of training samples of the data.
    """
    return cell.epochs(samples, compress(study, int(dict(cell.recipe)["epochs"]), epochs))


def compress(study: Study, own: int, epochs: int | None) -> int:
    """Return a number of epochs, changed by the factor of `epochs` to the epochs of the study's recipe; at least 1."""
    return own if epochs is None else max(1, round(own * epochs / study.epochs))


def check_epochs(study: Study, epochs: int) -> int | None:
    """Return a number of epochs in place of those of the study's recipe; None if it is the same number.

    Raises:
        UsageError: It is larger.
    """
    own = study.epochs
    if epochs > own:
        raise UsageError(
            f"`epochs` is {epochs}, and the recipe of {study.name} has {own}: pass fewer, or change a copy of its file"
        )
    return None if epochs == own else epochs


def _check_values(study: Study, name: str, values: Sequence[Value]) -> None:
    if name not in AXES and name not in RECIPE_FIELDS:
        raise unknown_name("`restrict`: there is no axis", name, [*AXES, *RECIPE_FIELDS])
    known = list(dict.fromkeys(cell.value(name) for cell in study.cells))
    for value in values:
        if value not in known:
            have = ", ".join(study.method_name(str(v)) if name == "method" else format_value(v) for v in known)
            raise UsageError(f"no cell of {study.name} has the {name} {format_value(value)}: they have {have}")
