"""Write a file with every option of a command, its value and its help, for --config."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from kdfast.cli.command import WORDS
from kdfast.cli.config.read import load_defaults
from kdfast.cli.output import say
from kdfast.errors import OutputError, UsageError

_WIDTH = 100
# Options that are no settings of the command.
_OMITTED = ("config", "write_config", "help", "help_options", "list_terms")


def write_config(context: typer.Context, path: Path | None) -> None:
    """Write the file and exit: values of the command line, of its --config, or the defaults.

    Raises:
        OutputError: The file exists or cannot be written.
    """
    if path is None:
        return
    from kdfast.files import atomic_write

    if os.path.lexists(path):
        raise OutputError(f"{path} exists; choose another --write-config, or delete it")
    text = describe_options(context)
    with atomic_write(path) as file:
        file.write(text.encode())
    say(f"options written to {path}; run {context.command_path} --config {path}")
    raise typer.Exit


def describe_options(context: Any) -> str:
    """Return the options of a command line as YAML, each after its help; those without a value as comments."""
    given, _, _ = context.command.make_parser(context).parse_args(args=list(context.meta[WORDS]))
    if (config := given.get("config")) is not None:
        load_defaults(context, Path(config))
    name = context.command_path
    blocks = [f"# Options of {name}. Pass this file with --config; the command line takes precedence.\n"]
    for parameter in context.command.params:
        if parameter.name not in _OMITTED and not getattr(parameter, "hidden", False):
            blocks.append(_describe(context, parameter, given))
    return "\n".join(blocks)


def _describe(context: Any, parameter: Any, given: dict[str, Any]) -> str:
    import yaml

    value, _ = parameter.consume_value(context, given)
    value = _plain(value, _number(get_type_hints(context.command.callback).get(parameter.name)))
    key = max(parameter.opts, key=len).lstrip("-")
    about = (parameter.help or "").strip() + (" (required)" if parameter.required else "")
    lines = textwrap.wrap(about, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    if value is None or value == []:
        lines.append(f"# {key}: {parameter.metavar or '...'}")
    else:
        lines.append(yaml.safe_dump({key: value}, width=10**9, allow_unicode=True).rstrip("\n"))
    return "\n".join(lines) + "\n"


def _number(kind: Any) -> type[int] | type[float] | None:
    """Return int or float if an option's values are such numbers, or lists of them; else None."""
    kinds = {kind, *get_args(kind)}
    kinds |= {part for one in kinds for part in get_args(one)}
    return int if int in kinds else float if float in kinds else None


def _plain(value: Any, number: type[int] | type[float] | None) -> Any:
    """Return a value as YAML writes it: numbers of a kind, if the option takes them, without quotes; paths as text.

    Raises:
        UsageError: It is no number where one is needed.
    """
    if isinstance(value, (list, tuple)):
        return [_plain(one, number) for one in value]
    if isinstance(value, str) and number is not None:
        try:
            return number(value)
        except ValueError as error:
            raise UsageError(f"{value!r} is no {'integer' if number is int else 'number'}: pass one") from error
    return str(value) if isinstance(value, Path) else value
