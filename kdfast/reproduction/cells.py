"""One cell of a study: the settings of its runs, in a form in which equal runs are equal."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kdfast.data.order import batch_count
from kdfast.data.subset import subset_size
from kdfast.distillation.config import RunConfig
from kdfast.distillation.losses.settings import parse_terms
from kdfast.errors import UsageError, unknown_name
from kdfast.reproduction.axes import (
    AXES,
    DEFAULTS,
    RECIPE_DEFAULTS,
    RECIPE_FIELDS,
    Value,
    Values,
    format_value,
    parse_value,
)
from kdfast.sweep.recipes import ResolvedMethod, resolve_method
from kdfast.sweep.spec import parse_methods

# What methods are computed from, in the order of what it costs; the first sets that suffice are built.
_INPUTS = ("dynamics", "cache", "teacher")

# Recipe fields that count epochs of a run, and may count parts of one.
_PHASES = ("warmup_epochs", "terms_warmup_epochs")


@dataclass(frozen=True)
class Cell:
    """One cell, without its seed. Axes that have no effect on its runs are None, or `random` for the method.

    Attributes:
        method: How the subset is selected, as in `kdfast sweep --methods`.
        fraction: Share of the training split to train on.
        kd: Whether a teacher takes part in the loss.
        student: Network of the student.
        disjoint: Whether the subset is chosen from the samples that the teacher was not trained on.
        alpha: Weight of the divergence from the teacher; a number or `auto`.
        temperature: Temperature of the divergence.
        ce_weight: Weight of the cross-entropy; None: 1 - alpha.
        term: A further term of the loss, as `kdfast distill --kd-term` takes it.
        term_weight: Its weight; None: 1.
        teacher: Network of the teacher.
        teacher_fraction: Share of the training split that the teacher was trained on.
        match_steps_of: Another fraction, whose number of steps the run has in place of its own.
        recipe: All of `RECIPE_FIELDS` with their values, in this order.
    """

    method: str
    fraction: float
    kd: bool
    student: str
    disjoint: bool
    alpha: float | str | None
    temperature: float | None
    ce_weight: float | None
    term: str | None
    term_weight: float | None
    teacher: str | None
    teacher_fraction: float | None
    match_steps_of: float | None
    recipe: tuple[tuple[str, Any], ...]

    def axes(self) -> Values:
        """Return the axes that have an effect, in the order of `AXES`."""
        values = {name: getattr(self, name) for name in AXES}
        return {n: value for n, value in values.items() if n == "kd" or (value is not None and value is not False)}

    def value(self, name: str) -> Value:
        """Return the value of an axis or of a recipe field."""
        value: Value = dict(self.recipe)[name] if name in RECIPE_FIELDS else getattr(self, name)
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return the axes and the recipe as JSON values; equal cells have equal dictionaries."""
        return {**self.axes(), "recipe": dict(self.recipe)}

    def __str__(self) -> str:
        """Return the cell on one line, as the options of `--set` are written, with what its recipe changes."""
        changed = {name: value for name, value in self.recipe if value != RECIPE_DEFAULTS[name]}
        return " ".join(f"{name}={format_value(value)}" for name, value in {**self.axes(), **changed}.items())

    def epochs(self, samples: int, epochs: int | None = None) -> int:
        """Return the epochs of the run.

        Args:
            samples: Number of training samples of the data.
            epochs: Epochs in place of the recipe's.
        """
        recipe = dict(self.recipe)
        own = recipe["epochs"] if epochs is None else epochs
        if self.match_steps_of is None:
            return int(own)
        batch = recipe["batch_size"]
        steps = own * batch_count(subset_size(samples, self.match_steps_of), batch)
        return max(1, round(steps / batch_count(subset_size(samples, self.fraction), batch)))

    def run_config(self, *, epochs: int, seed: int, precision: str) -> RunConfig:
        """Return the settings of a run but alpha, which is 0.

        Phases of the recipe that count epochs, such as a warm-up, keep their share of the run.

        Raises:
            UsageError: They do not fit together.
        """
        recipe = dict(self.recipe)
        share = epochs / max(1, recipe.pop("epochs"))
        recipe |= {name: recipe[name] * share for name in _PHASES}
        if recipe["initial_epochs"]:  # a whole number, but not all epochs
            recipe["initial_epochs"] = min(epochs - 1, max(1, round(recipe["initial_epochs"] * share)))
        loss: dict[str, Any] = {}
        if self.kd:
            terms = [] if self.term is None else [self.term]
            weights = [] if self.term_weight is None or not terms else [self.term_weight]
            loss = {"temperature": self.temperature, "ce": self.ce_weight, "terms": parse_terms(terms, weights)}
        return RunConfig(student=self.student, **recipe, **loss, epochs=epochs, seed=seed, precision=precision)


@functools.lru_cache(maxsize=1024)
def resolve(method: str) -> ResolvedMethod:
    """Return a method of a study with the fewest inputs that it can be computed from.

    Raises:
        UsageError: It is unknown, or has an unknown option.
    """
    (spec,) = parse_methods(method)
    for count in range(len(_INPUTS) + 1):
        for given in itertools.combinations(_INPUTS, count):
            try:
                return resolve_method(spec, {}, frozenset(given))
            except UsageError as error:
                last = error
    raise last


def make_cell(values: Mapping[str, Any]) -> Cell:
    """Return the cell of settings, of which those without effect are dropped.

    Args:
        values: Values of axes and recipe fields, checked on their own; missing axes have their default.

    Raises:
        UsageError: The settings do not fit together.
    """
    axes: dict[str, Any] = {**DEFAULTS, **{name: value for name, value in values.items() if name in AXES}}
    recipe = tuple((name, values.get(name, RECIPE_DEFAULTS[name])) for name in RECIPE_FIELDS)
    if axes["term"] is None and axes["term_weight"] is not None:
        raise UsageError(f"`term_weight` is {axes['term_weight']:g} without a `term`: add one, or omit it")
    if axes["term"] is not None and axes["term_weight"] is None:
        axes["term_weight"] = 1.0
    if not axes["kd"] or (axes["alpha"] == 0 and axes["term"] is None):
        axes |= dict.fromkeys(("alpha", "temperature", "ce_weight", "term", "term_weight")) | {"kd": False}
    method = resolve(axes["method"])
    if axes["fraction"] == 1:
        method = resolve("random")  # all data, however they are chosen
    axes["method"] = str(method)
    needs_teacher = axes["kd"] or bool(method.inputs & {"cache", "teacher"})
    if not needs_teacher:
        axes["teacher"] = None
    if not (needs_teacher or axes["disjoint"]):
        axes["teacher_fraction"] = None
    if axes["disjoint"] and axes["fraction"] + axes["teacher_fraction"] > 1 + 1e-9:
        raise UsageError(
            f"`disjoint` is on, with `fraction` {axes['fraction']:g} and `teacher_fraction` "
            f"{axes['teacher_fraction']:g}, more than all samples together: lower one"
        )
    cell = Cell(**axes, recipe=recipe)
    checked = cell.run_config(epochs=cell.epochs(50_000), seed=0, precision="fp32")
    most = 1.0 if checked.ce is None else float("inf")
    if cell.alpha not in (None, "auto") and float(cell.alpha or 0) > most:
        raise UsageError(f"`alpha` is {cell.alpha:g}: write a number of at most 1, or add `ce_weight`")
    return cell


def expand(entry: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[Cell]:
    """Yield the cells of an entry: the product of the lists of its values, the first key varying slowest.

    Args:
        entry: Values, or lists of values, by axis or recipe field.
        base: Values of what the entry does not name.

    Raises:
        UsageError: A name or a value is not accepted, or settings do not fit together.
    """
    lists = []
    for name, given in entry.items():
        if name not in AXES and name not in RECIPE_FIELDS:
            raise unknown_name("there is no axis", str(name), [*AXES, *RECIPE_FIELDS])
        values = given if isinstance(given, list) else [given]
        if not values:
            raise UsageError(f"`{name}` is an empty list: write values")
        lists.append([parse_value(name, value) for value in values])
    for chosen in itertools.product(*lists):
        yield make_cell({**base, **dict(zip(entry, chosen, strict=True))})
