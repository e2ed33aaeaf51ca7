"""The syntax of a sweep's methods: `SCORE[:option=value,...][/RULE[:option=value,...]]`, separated by commas.

    random,el2n,dual              each score with the rule it was published with
    el2n/beta:a=1,b=3             another rule for a score, with options of the rule
    beta:a=2,b=3                  a rule alone: applied to influence:kind=self, the score that IF-Beta ranks by
    influence:kind=absolute/hard  options of the score
    if-beta:steps=30              a method that selects the subset directly, with its options

A comma separates methods, unless an `option=value` follows, which belongs to the method before it.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdfast.errors import UsageError

Value = int | float | str
Options = tuple[tuple[str, Value], ...]


@dataclass(frozen=True)
class MethodSpec:
    """One method as written, its names not looked up.

    Attributes:
        name: Name of a score, of a rule alone, or of a method that selects the subset directly.
        options: Its options, sorted by name.
        rule: Name of the selection rule; None: the rule published with the score.
        rule_options: Options of the rule, sorted by name.
    """

    name: str
    options: Options = ()
    rule: str | None = None
    rule_options: Options = ()

    def __str__(self) -> str:
        """Return the shortest spelling; equal specs have equal spellings."""
        rule = "" if self.rule is None else f"/{_format(self.rule, self.rule_options)}"
        return _format(self.name, self.options) + rule


def parse_methods(text: str) -> tuple[MethodSpec, ...]:
    """Parse comma-separated methods.

    Args:
        text: The methods, in the syntax of this module.

    Returns:
        The methods, in the order given.

    Raises:
        UsageError: There is no method, one is named twice, or the syntax is wrong.
    """
    parts: list[str] = []
    for item in (piece.strip() for piece in text.split(",")):
        head = item.split("/")[0].split(":")[0]
        if "=" in head and parts:
            parts[-1] += f",{item}"
        elif item:
            parts.append(item)
    specs = tuple(_parse(part) for part in parts)
    if not specs:
        raise UsageError("`methods` is empty: pass names separated by commas, such as random,el2n")
    for position, spec in enumerate(specs):
        if spec in specs[:position]:
            raise UsageError(f"`methods` names {spec} twice: name it once")
    return specs


def _parse(text: str) -> MethodSpec:
    score, slash, rule = text.partition("/")
    name, options = _parse_part(score, text)
    if not slash:
        return MethodSpec(name, options)
    return MethodSpec(name, options, *_parse_part(rule, text))


def _parse_part(text: str, whole: str) -> tuple[str, Options]:
    name, colon, rest = text.partition(":")
    options: dict[str, Value] = {}
    for pair in rest.split(",") if colon else ():
        key, equals, value = (word.strip() for word in pair.partition("="))
        if not (key and equals and value) or key in options:
            raise UsageError(f"`methods` contains {pair!r} in {whole!r}: write NAME:option=value,option=value")
        options[key] = _parse_value(value)
    name = name.strip()
    if not name or "=" in name:
        raise UsageError(f"`methods` contains {whole!r}: write SCORE, SCORE/RULE or SCORE/RULE:option=value")
    return name, tuple(sorted(options.items()))


def _parse_value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _format(name: str, options: Options) -> str:
    if not options:
        return name
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in options)
