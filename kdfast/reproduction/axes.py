"""The axes of a study's cells: names, values, defaults, and the checks of what a study file gives for them."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

from kdfast.distillation.config import RunConfig
from kdfast.distillation.losses.settings import parse_terms
from kdfast.errors import UsageError, unknown_name
from kdfast.sweep.spec import parse_methods

Value: TypeAlias = bool | int | float | str | None
Values: TypeAlias = dict[str, Value]

# Fields of `RunConfig` that a study's recipe, its teachers and dynamics, and single cells may set.
RECIPE_FIELDS = (
    "epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule", "warmup_epochs", "views", "initial_epochs",
    "terms_warmup_epochs", "optimizer", "label_smoothing", "ema", "clip", "mixup", "cutmix",
)  # fmt: skip


@contextlib.contextmanager
def locate_errors(where: str) -> Iterator[None]:
    """Name the file and the key, `where`, in the UsageErrors that the block raises."""
    try:
        yield
    except UsageError as error:
        # Without backticks, which would make an option of the command line of a key of the file.
        raise UsageError(f"{where}: {error}".replace("`", "")) from error


def _number(value: Any) -> float:
    try:
        if not isinstance(value, bool) and isinstance(value, (int, float)) and math.isfinite(value):
            return float(value)
    except OverflowError:  # an integer of hundreds of digits
        pass
    raise ValueError("write a number")


def _share(value: Any) -> float:
    if not 0 < _number(value) <= 1:
        raise ValueError("write a number above 0 and at most 1")
    return float(value)


def _weight(value: Any) -> float:
    if _number(value) < 0:
        raise ValueError("write a number of at least 0")
    return float(value)


def _positive(value: Any) -> float:
    if _number(value) <= 0:
        raise ValueError("write a number above 0")
    return float(value)


def _alpha(value: Any) -> float | str:
    if value == "auto":
        return "auto"
    try:
        return _weight(value)
    except ValueError as error:
        raise ValueError("write a number of at least 0, or auto") from error


def _switch(value: Any) -> bool:
    # YAML reads the words on and off as true and false; from the command line they are words.
    words = {"on": True, "off": False, "true": True, "false": False}
    if isinstance(value, bool):
        return value
    if not isinstance(value, str) or value not in words:
        raise ValueError("write on or off")
    return words[value]


def _word(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("write a name")
    return value


def _method(value: Any) -> str:
    specs = parse_methods(_word(value))
    if len(specs) != 1:
        raise ValueError("write one method")
    return str(specs[0])


def _term(value: Any) -> str:
    parse_terms([_word(value)], [])
    return str(value)


# What an axis accepts; each function returns the value, or raises ValueError with what to write.
AXES: dict[str, Callable[[Any], Value]] = {
    "method": _method,
    "fraction": _share,
    "kd": _switch,
    "alpha": _alpha,
    "temperature": _positive,
    "ce_weight": _weight,
    "term": _term,
    "term_weight": _weight,
    "teacher": _word,
    "teacher_fraction": _share,
    "disjoint": _switch,
    "student": _word,
    "match_steps_of": _share,
}

# Values of the axes that neither a study's `defaults` nor a cell gives.
DEFAULTS: Values = {
    "method": "random", "fraction": 1.0, "kd": True, "alpha": 0.5, "temperature": 4.0, "ce_weight": None, "term": None,
    "term_weight": None, "teacher": "resnet32", "teacher_fraction": 1.0, "disjoint": False, "student": "resnet32",
    "match_steps_of": None,
}  # fmt: skip

_OPTIONAL = ("ce_weight", "term", "term_weight", "match_steps_of")  # null stands for none
RECIPE_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in dataclasses.fields(RunConfig) if field.name in RECIPE_FIELDS
}
_RECIPE_TYPES = {field.name: str(field.type) for field in dataclasses.fields(RunConfig)}


def parse_value(name: str, value: Any) -> Value:
    """Return the value of an axis or a recipe field, checked on its own.

    Raises:
        UsageError: There is no such axis or field, or it does not accept the value.
    """
    if name in AXES:
        if value in (None, "none") and name in _OPTIONAL:
            return None
        try:
            return AXES[name](value)
        except ValueError as error:  # UsageError is one
            raise UsageError(f"`{name}` is {value!r}: {error}") from error
    if name not in RECIPE_FIELDS:
        raise unknown_name("there is no axis", name, [*AXES, *RECIPE_FIELDS])
    kind = _RECIPE_TYPES[name].removesuffix(" | None")
    accepted: tuple[type, ...] = {"int": (int,), "float": (int, float)}.get(kind, (str,))
    if kind in ("int", "float") and isinstance(value, str) and _is_number(value):
        raise UsageError(f"`{name}` is {value!r}, a word in YAML: write {float(value):g}")
    if type(value) not in accepted:
        raise UsageError(f"`{name}` is {value!r}: write {'a word' if kind == 'str' else f'a number ({kind})'}")
    number_or_word: Value = float(value) if kind == "float" else value
    return number_or_word


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def format_value(value: Value) -> str:
    """Return a value as it is written on the command line."""
    if isinstance(value, bool) or value is None:
        return {True: "on", False: "off", None: "none"}[value]
    if not isinstance(value, float):
        return str(value)
    return short if float(short := f"{value:g}") == value else repr(value)


def parse_text(name: str, text: str) -> Value:
    """Return the value of an axis as written on the command line.

    Raises:
        UsageError: As `parse_value`.
    """
    for kind in (int, float):
        try:
            return parse_value(name, kind(text))
        except UsageError:
            break
        except ValueError:
            continue
    return parse_value(name, text)


def parse_fields(fields: Mapping[str, Any], names: tuple[str, ...]) -> Values:
    """Return single values by name, checked; only some names are allowed.

    Raises:
        UsageError: A name is not allowed, or a value is not accepted.
    """
    for name in fields:
        if name not in names:
            raise unknown_name("there is no key", str(name), names)
    return {name: parse_value(name, value) for name, value in fields.items()}
