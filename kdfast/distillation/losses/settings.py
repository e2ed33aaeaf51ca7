"""What a run's loss consists of: the weights of its parts, and the terms with their options."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from kdfast.distillation.losses.base import TermEntry
from kdfast.distillation.losses.registry import get_term
from kdfast.errors import UsageError, unknown_name
from kdfast.nets.taps import TAPS
from kdfast.ops.kd_loss.validation import check_temperature

# Share of a run's epochs in which terms with a phase of their own train; RepDistiller has 30 epochs for 240.
INITIAL_SHARE = 1 / 8
PRESETS = ("paper", "tuned")
SIDES = ("student", "teacher")


@dataclass(frozen=True)
class TermSetting:
    """One term of a loss.

    Attributes:
        name: A key of `LOSSES`.
        weight: Its factor, 0 or more.
        options: (name, value) of every option, sorted by name.

    Raises:
        UsageError: There is no such term or option, the weight is negative or not finite, or a temperature is not
            positive.
    """

    name: str
    weight: float = 1.0
    options: tuple[tuple[str, float], ...] = ()

    def __post_init__(self) -> None:
        entry = get_term(self.name)
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise UsageError(f"the term {self.name} has weight {self.weight:g}: pass a finite number, 0 or more")
        given = dict(self.options)
        for name, value in given.items():
            if name not in entry.options:
                raise unknown_name(f"the term {self.name} has no option", name, list(entry.options))
            if not math.isfinite(value):
                raise UsageError(f"the term {self.name} has {name} {value:g}: pass a finite number")
            if name == "temperature":
                check_temperature(value, name=f"the temperature of the term {self.name}", error=UsageError)
        object.__setattr__(self, "options", tuple(sorted({**entry.options, **given}.items())))

    @property
    def entry(self) -> TermEntry:
        """The term's entry in the registry."""
        return get_term(self.name)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {"name": self.name, "weight": self.weight, "options": dict(self.options)}


def parse_terms(texts: list[str], weights: list[float], preset: str = "paper") -> tuple[TermSetting, ...]:
    """Parse terms as written on the command line.

    Args:
        texts: `NAME` or `NAME:option=value,...`, each.
        weights: A weight for each term, or none.
        preset: Where the weights come from if none are given: 1 for all (`paper`: the comparison of Ben-Baruch et al.),
            or those of RepDistiller's scripts (`tuned`).

    Returns:
        The terms, in the order given.

    Raises:
        UsageError: A term is unknown, is named twice, or has an unknown option or a wrong value; the numbers of terms
            and weights differ; there is no such preset; or weights or a preset have no effect.
    """
    if preset not in PRESETS:
        raise unknown_name("`kd_preset`: no preset is named", preset, list(PRESETS))
    if weights and not texts:
        raise UsageError(f"`kd_weight` is {weights[0]:g}, and the loss has no terms: omit it, or add `kd_term`")
    if preset != "paper" and not texts:
        raise UsageError(f"`kd_preset` is {preset}, and the loss has no terms: omit it, or add `kd_term`")
    if preset != "paper" and weights:
        raise UsageError(f"`kd_preset` is {preset}, and every term has a weight of its own: omit it, or `kd_weight`")
    if weights and len(weights) != len(texts):
        raise UsageError(
            f"{len(texts)} terms have {len(weights)} weights: pass one `kd_weight` for each `kd_term`, or none"
        )
    terms: list[TermSetting] = []
    for position, text in enumerate(texts):
        name, _, rest = text.partition(":")
        name = name.strip()
        if name in (term.name for term in terms):
            raise UsageError(f"`kd_term` names {name} twice: pass it once")
        weight = weights[position] if weights else get_term(name).tuned if preset == "tuned" else 1.0
        terms.append(TermSetting(name, weight, _parse_options(text, rest)))
    return tuple(terms)


def parse_taps(texts: list[str]) -> tuple[tuple[str, str], ...]:
    """Parse places of activations, `SIDE.NAME=MODULE` each, into the pairs of `RunConfig.taps`, sorted.

    Raises:
        UsageError: One is not of that form, or a name is given twice.
    """
    places: dict[str, str] = {}
    for text in texts:
        key, _, place = (word.strip() for word in text.partition("="))
        side, _, name = key.partition(".")
        if side not in SIDES or name not in TAPS or not place or key in places:
            raise UsageError(
                f"`tap` is {text!r}: write student.NAME=MODULE or teacher.NAME=MODULE, each once, with a NAME of "
                f"{', '.join(TAPS)}"
            )
        places[key] = place
    return tuple(sorted(places.items()))


def _parse_options(text: str, rest: str) -> tuple[tuple[str, float], ...]:
    options: dict[str, float] = {}
    for pair in rest.split(",") if rest else ():
        name, _, value = (word.strip() for word in pair.partition("="))
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if not name or name in options or math.isnan(number):
            raise UsageError(f"`kd_term` is {text!r}: write NAME or NAME:option=number,option=number")
        options[name] = number
    return tuple(options.items())
