"""Names of networks with arguments: `resnet8`, `torchvision:NAME`, `hf:PATH`, `models.py:Net(width=2)`.

A name and its arguments are one text, so that settings, results and checkpoints record both in the same field.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kdfast.errors import UsageError

Kind = Literal["name", "torchvision", "timm", "hf", "file", "module"]

FORMS = "torchvision:NAME, timm:NAME, hf:FOLDER, FILE.py:NAME or PACKAGE.MODULE:NAME"
_LIBRARIES: tuple[Kind, ...] = ("torchvision", "timm", "hf")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_WORDS = {"true": True, "false": False, "none": None, "null": None}
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class NetSpec:
    """Where a network comes from.

    Attributes:
        kind: A name of NETS, a library, a folder of Hugging Face, a file of Python or an importable module.
        place: What is in front of the last colon: the library, file or module; empty for a name.
        member: What is behind it: the name of a network, class or function, or the folder.
        arguments: Keyword arguments for what builds the network.
    """

    kind: Kind
    place: str
    member: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> str:
        """The name without the arguments."""
        return f"{self.place}:{self.member}" if self.place else self.member

    @property
    def runs_own_code(self) -> bool:
        """Whether building it runs code that belongs neither to kdfast nor to a library of networks."""
        return self.kind in ("file", "module")

    def __str__(self) -> str:
        if not self.arguments:
            return self.target
        return f"{self.target}({', '.join(f'{name}={self.arguments[name]!r}' for name in sorted(self.arguments))})"


def parse_spec(text: str) -> NetSpec:
    """Read the name of a network, with its arguments if it has any.

    Raises:
        UsageError: The text is no such name; the message lists the forms.
    """
    target, arguments = _split_arguments(text)
    head, colon, rest = target.partition(":")
    if not colon:
        if target.endswith(".py"):
            raise UsageError(f"{target} is a file: say which class or function in it, as {target}:NAME")
        return NetSpec("name", "", target, arguments)
    for library in _LIBRARIES:
        if head == library and rest:
            return NetSpec(library, library, rest, arguments)
    place, _, member = target.rpartition(":")
    if member.isidentifier() and place.endswith(".py"):
        return NetSpec("file", place, member, arguments)
    if member.isidentifier() and _MODULE.fullmatch(place):
        return NetSpec("module", place, member, arguments)
    raise UsageError(f"no network is named {text!r}: pass a name of kdfast, such as resnet8, {FORMS}")


def add_arguments(text: str, arguments: Mapping[str, Any]) -> str:
    """Return the name of a network with further arguments.

    Raises:
        UsageError: One is given twice, or is no plain value.
    """
    if not arguments:
        return text
    spec = parse_spec(text)
    for name, value in arguments.items():
        if name in spec.arguments:
            raise UsageError(f"`net_arg` {name} is given twice, as {spec.arguments[name]!r} and {value!r}: pass one")
        _check_value(name, value)
    return str(NetSpec(spec.kind, spec.place, spec.member, {**spec.arguments, **arguments}))


def parse_arguments(words: Iterable[str]) -> dict[str, Any]:
    """Read arguments given as NAME=VALUE: numbers, true, false, none, lists such as [1, 2], or else text.

    Raises:
        UsageError: A word has no name, or a name is given twice.
    """
    arguments: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name.isidentifier():
            raise UsageError(f"`net_arg` is {word!r}: pass NAME=VALUE")
        if name in arguments:
            raise UsageError(f"`net_arg` {name} is given twice: pass it once")
        arguments[name] = _parse_value(value)
    return arguments


def _parse_value(text: str) -> Any:
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
    return value if _is_plain(value) else text


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, _PLAIN)


def _check_value(name: str, value: Any) -> None:
    if not name.isidentifier() or not _is_plain(value):
        raise UsageError(
            f"`net_arg` {name} is {value!r}: pass a name of Python, and a number, text, truth value, None or a list of "
            "these"
        )


def _split_arguments(text: str) -> tuple[str, dict[str, Any]]:
    """Return a name and its arguments; parentheses that hold no NAME=VALUE belong to the name."""
    for position, character in enumerate(text):
        if character != "(" or not text.endswith(")"):
            continue
        try:
            call = ast.parse(f"f{text[position:]}", mode="eval").body
            assert isinstance(call, ast.Call)
            named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
        except (SyntaxError, ValueError, TypeError, AssertionError, MemoryError, RecursionError):
            continue
        if call.args or not named or None in named or not isinstance(call.func, ast.Name):
            continue
        arguments = {str(name): value for name, value in named.items()}
        for name, value in arguments.items():
            _check_value(name, value)
        return text[:position], arguments
    return text, {}
