"""The commands' class: checks of all paths, the options of every command, and spellings that help does not show."""

from __future__ import annotations

import copy
import functools
import math
import os
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from kdfast.cli.output import MODE, complain, is_main_process
from kdfast.cli.paths import check_paths, check_words
from kdfast.errors import UsageError

# The network that a command trains: --student where a teacher takes part, --net elsewhere; each accepts the other.
HIDDEN_SPELLINGS = {"net": "--student", "student": "--net"}

# Commands that several processes share, when torchrun starts them; the main one alone runs any other.
SHARED = ("teacher train", "dynamics", "score", "distill")
# What torchrun tells the processes that it starts.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")

# Key of a context's meta with the words of the command line.
WORDS = "kdfast.words"


def _store(_context: typer.Context, parameter: typer.CallbackParam, value: bool) -> bool:
    """Set the attribute of `MODE` that is named like the option's parameter."""
    setattr(MODE, str(parameter.name), bool(value))
    return value


def _common(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the result as one JSON object.", callback=_store)
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option(
            "--quiet",
            help="Print no progress and no result but that of --json; warnings and errors are still printed.",
            callback=_store,
        ),
    ] = False,
    log_json: Annotated[
        bool,
        typer.Option(
            "--log-json", help="Write progress to the standard error, one JSON object per line.", callback=_store
        ),
    ] = False,
) -> None:
    """Hold the options that every command has besides its own."""


@functools.cache
def _common_options() -> list[Any]:
    """Return the options of `_common`, which set `MODE` and are no arguments of a command's function."""
    template = typer.Typer(add_completion=False)
    template.command()(_common)
    found = [parameter for parameter in typer.main.get_command(template).params if parameter.name != "help"]
    for parameter in found:
        parameter.expose_value = False
    return found


class _Checked:
    """Checks the words of a command line before they are parsed, and the paths before the command runs."""

    params: list[Any]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params.extend(_common_options())

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        check_words(args)
        ctx.meta[WORDS] = list(args)
        parsed: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return parsed

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        check_paths(self.params, ctx.params)
        _check_numbers(ctx.params)
        return super().invoke(ctx)  # type: ignore[misc]


def leave_to_main_process(name: str) -> None:
    """End the other processes that torchrun started for a command that one process runs."""
    processes = os.environ.get("WORLD_SIZE", "")
    if not processes.isdecimal() or int(processes) < 2 or "RANK" not in os.environ:
        return
    if not is_main_process():
        raise typer.Exit
    for variable in _LAUNCHED:  # for what the command starts itself, too
        os.environ.pop(variable, None)
    complain(f"kdfast: {name} runs in one process: the others of the {processes} that were started do nothing")


def _check_numbers(values: Mapping[str, Any]) -> None:
    """Raise UsageError if an argument is NaN, which passes every comparison with bounds that it should fail."""
    for name, value in values.items():
        numbers = value if isinstance(value, (list, tuple)) else [value]
        if any(isinstance(number, float) and math.isnan(number) for number in numbers):
            raise UsageError(f"`{name}` is nan: pass a number")


class Group(_Checked, TyperGroup):
    """A command that has further commands below it."""


class Command(_Checked, TyperCommand):
    """A command that accepts `HIDDEN_SPELLINGS`."""

    def make_parser(self, ctx: Any) -> Any:
        """Return the parser of the command line, with the hidden spellings."""
        parser = super().make_parser(ctx)
        for parameter in self.params:
            if parameter.name in HIDDEN_SPELLINGS:
                alias = copy.copy(parameter)
                alias.opts = [HIDDEN_SPELLINGS[parameter.name]]
                alias.add_to_parser(parser, ctx)
        return parser

    def invoke(self, ctx: Any) -> Any:
        """Run the command, in the main process alone unless several share it."""
        name = ctx.command_path.split(" ", 1)[-1]
        if name not in SHARED:
            leave_to_main_process(name)
        return super().invoke(ctx)
