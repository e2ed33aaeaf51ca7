"""Replace the markers on a page with a reference of the program's commands, scores, rules and selectors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import typer
from sphinx.application import Sphinx

from kdfast.cli.program import app
from kdfast.pruning.options import Option
from kdfast.pruning.rules.registry import RULES
from kdfast.pruning.scores.registry import SCORES
from kdfast.pruning.selectors import SELECTORS

# Type names in the output of some versions of the option parser.
TYPES = {"int": "INTEGER", "float": "NUMBER", "str": "TEXT"}


def render_commands() -> str:
    """Return a table of all commands and one section for each, in Markdown."""
    found = list(_walk_commands(typer.main.get_command(app), ("kdfast",)))
    rows = [
        f"| `{' '.join(path)}` | {_escape_bars(_format_help(command.help or '').splitlines()[0])} |"
        for path, command in found
    ]
    sections = [line for path, command in found for line in _render_command(path, command)]
    return "\n".join(["| command | what it does |\n|---|---|", *rows, "", *sections])


def render_methods() -> str:
    """Return one section each for scores, rules and selectors, in Markdown."""
    registries = {"Scores": SCORES, "Rules": RULES, "Methods that select the subset directly": SELECTORS}
    return "\n".join(line for title, entries in registries.items() for line in _render_registry(title, entries))


MARKERS = {"<!-- commands -->": render_commands, "<!-- methods -->": render_methods}


def _walk_commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield each visible command with its words, depth first; skip groups that only contain commands."""
    children = getattr(command, "commands", {})
    if len(path) > 1 and (not children or command.invoke_without_command):
        yield path, command
    for name, child in children.items():
        if not child.hidden:
            yield from _walk_commands(child, (*path, name))


def _render_command(path: tuple[str, ...], command: Any) -> Iterator[str]:
    parameters = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    context = command.context_class(command)
    arguments = [_format_flags(p, context) for p in parameters if p.param_type_name == "argument"]
    yield f"## {' '.join(path)}\n"
    yield f"{_format_help(command.help or '')}\n"
    yield f"```text\n{' '.join([*path, *arguments, '[OPTIONS]'])}\n```\n"
    if parameters:
        yield "| option | meaning |\n|---|---|"
        yield from (f"| `{_escape_bars(_format_flags(p, context))}` | {_describe_parameter(p)} |" for p in parameters)
        yield ""


def _format_flags(parameter: Any, context: Any) -> str:
    """Return an option's flags with the type of its value, or the name of an argument."""
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name).upper()
    flags, _, kind = parameter.get_help_record(context)[0].partition(" ")
    kind = kind.strip("<>").removesuffix(" range").removesuffix(" RANGE")
    return f"{flags} {parameter.metavar or TYPES.get(kind, kind.upper())}".strip()


def _describe_parameter(parameter: Any) -> str:
    facts = ["required"] if parameter.required else []
    default = parameter.default
    if not (parameter.required or getattr(parameter, "is_flag", False) or default in (None, (), [])):
        facts.append(f"default: {default}")
    return _escape_bars(_format_help(parameter.help or "")) + (f" *({'; '.join(facts)})*" if facts else "")


def _render_registry(title: str, entries: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}\n"
    for name, entry in entries.items():
        needs = " or ".join(sorted(getattr(entry, "needs", ())))
        yield f"### `{name}`\n"
        yield f"{_format_help(entry.summary)}{f' *(from {needs})*' if needs else ''}\n"
        if entry.options:
            yield "| option | meaning | default |\n|---|---|---|"
            yield from (
                f"| `{key}` | {_describe_option(option)} | {_format_default(option)} |"
                for key, option in entry.options.items()
            )
            yield ""


def _describe_option(option: Option) -> str:
    return _escape_bars(f"{_format_help(option.summary)} ({option.values_text})".replace(" from -inf to inf", ""))


def _format_default(option: Option) -> str:
    return "automatic" if option.default is None else f"`{option.default}`"


def _escape_bars(text: str) -> str:
    return text.replace("|", "\\|")


def _format_help(text: str) -> str:
    """Return help text with one line per paragraph, and options and placeholders as code."""
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return "\n\n".join(re.sub(r"(?<![\w`-])(--[a-z][\w-]*|\S*\{\w+\}\S*)", r"`\1`", part) for part in paragraphs)


def _fill_markers(sphinx: Sphinx, page: str, content: list[str]) -> None:
    for marker, make in MARKERS.items():
        if marker in content[0]:
            content[0] = content[0].replace(marker, make())


def setup(sphinx: Sphinx) -> dict[str, bool]:
    """Register the extension."""
    sphinx.connect("source-read", _fill_markers)
    return {"parallel_read_safe": True}
