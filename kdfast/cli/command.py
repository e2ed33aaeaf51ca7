"""The commands' class: checks of all paths, and options that also accept spellings that help does not show."""

from __future__ import annotations

import copy
from typing import Any

from typer.core import TyperCommand, TyperGroup

from kdfast.cli.paths import check_paths, check_words

# The network that a command trains: --student where a teacher takes part, --net elsewhere; each accepts the other.
HIDDEN_SPELLINGS = {"net": "--student", "student": "--net"}


class _Checked:
    """Checks the words of a command line before they are parsed, and the paths before the command runs."""

    params: list[Any]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line."""
        check_words(args)
        parsed: list[str] = super().parse_args(ctx, args)  # type: ignore[misc]
        return parsed

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        check_paths(self.params, ctx.params)
        return super().invoke(ctx)  # type: ignore[misc]


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
