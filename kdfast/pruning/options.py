"""Options of scores, selection rules and selectors: one declaration to check, default and print each of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from kdfast.errors import UsageError, unknown_name

OptionValue = float | int | str | None


@dataclass(frozen=True)
class Only:
    """When an option has an effect.

    Attributes:
        text: What must hold, for messages: with or without another option.
        holds: Whether it does, given every option with its value.
    """

    text: str
    holds: Callable[[Mapping[str, OptionValue]], bool]


@dataclass(frozen=True)
class Option:
    """One option of a score, a rule or a selector.

    Attributes:
        default: Default value. None: computed when the option is used, as the summary says.
        summary: One line for help.
        low: Smallest number allowed.
        high: Largest number allowed.
        integer: Whether the number must be an integer.
        choices: Allowed values, if the option is not a number.
        span: Whether the value is a range of whole numbers, the text `first..last`; `low` and `high` bound both ends.
        only: When the option has an effect; None: always.
    """

    default: OptionValue
    summary: str
    low: float = -math.inf
    high: float = math.inf
    integer: bool = False
    choices: tuple[str, ...] = ()
    span: bool = False
    only: Only | None = None

    @property
    def values_text(self) -> str:
        """The allowed values, for messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.span:
            return f"first..last, two whole numbers from {self.low:g} to {self.high:g}, as in 1..10"
        return f"{'a whole number' if self.integer else 'a number'} from {self.low:g} to {self.high:g}"

    def parse(self, name: str, value: OptionValue) -> OptionValue:
        """Check a value, which may be text from a command line.

        Args:
            name: The option's name, for messages.
            value: The value; None stays None.

        Raises:
            UsageError: The value is not one of the choices, not a number or range, or out of range.
        """
        if value is None:
            return None
        if self.choices:
            if value not in self.choices:
                raise UsageError(f"option {name}={value}: must be {self.values_text}")
            return value
        if self.span:
            numbers = read_span(value) if re.fullmatch(r"\d+\.\.\d+", str(value)) else range(0)
            if not numbers or not self.low <= numbers[0] <= numbers[-1] <= self.high:
                raise UsageError(f"option {name}={value}: must be {self.values_text}")
            return f"{numbers[0]}..{numbers[-1]}"
        try:
            number = float(value)
        except ValueError:
            raise UsageError(f"option {name}={value}: must be a number") from None
        if not self.low <= number <= self.high or (self.integer and number != int(number)):
            raise UsageError(f"option {name}={value}: must be {self.values_text}")
        return int(number) if self.integer else number


def read_span(value: OptionValue) -> range:
    """Return the numbers of a range `first..last`, both ends included; the value of an option with `span`."""
    first, last = str(value).split("..")
    return range(int(first), int(last) + 1)


def complete_options(
    owner: str, options: Mapping[str, Option], given: Mapping[str, OptionValue]
) -> dict[str, OptionValue]:
    """Return every option with its value: the given one, else the default.

    Args:
        owner: What the options belong to, for messages.
        options: The options by name.
        given: Values by name; None means not given.

    Raises:
        UsageError: An option does not exist (the nearest is suggested), a value is not allowed, or one other than the
            default has no effect.
    """
    for name in given:
        if name not in options:
            raise unknown_name(f"{owner} has no option", name, options)
    values = {name: option.default if given.get(name) is None else given[name] for name, option in options.items()}
    parsed = {name: option.parse(name, values[name]) for name, option in options.items()}
    for name, option in options.items():
        if option.only is not None and parsed[name] != option.default and not option.only.holds(parsed):
            raise UsageError(
                f"option {name}={parsed[name]} of {owner} has an effect only {option.only.text}: change that, or omit "
                f"{name}"
            )
    return parsed


def parse_options(texts: Iterable[str]) -> dict[str, OptionValue]:
    """Read texts of the form `name=value`.

    Raises:
        UsageError: A text does not have that form, or a name comes twice.
    """
    options: dict[str, OptionValue] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"option {text!r}: write it as name=value")
        if name in options:
            raise UsageError(f"option {name} appears twice: pass it once")
        options[name] = value
    return options
