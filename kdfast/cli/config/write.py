"""Write a file with every option of a command, its value and its help, for --config."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path
from typing import Any

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
    value = _plain(value, parameter.get_default(context))
    key = max(parameter.opts, key=len).lstrip("-")
    about = (parameter.help or "").strip() + (" (required)" if parameter.required else "")
    lines = textwrap.wrap(about, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    if value is None or value == []:
        lines.append(f"# {key}: {parameter.metavar or '...'}")
    else:
        lines.append(yaml.safe_dump({key: value}, width=10**9, allow_unicode=True).rstrip("\n"))
    return "\n".join(lines) + "\n"


def _plain(value: Any, default: Any) -> Any:
    """Return a value as YAML writes it: numbers without quotes where the default shows that it is one, paths as text.

    Raises:
        UsageError: It is no number where one is needed.
    """
    if isinstance(value, (list, tuple)):
        return [_plain(one, None) for one in value]
    if isinstance(value, str) and type(default) in (int, float):
        try:
            return type(default)(value)
        except ValueError as error:
            raise UsageError(f"{value!r} is no number: pass one in place of {default}") from error
    return str(value) if isinstance(value, Path) else value
