"""A command whose options also accept spellings that help does not show."""

from __future__ import annotations

import copy
from typing import Any

from typer.core import TyperCommand

# The network that a command trains: --student where a teacher takes part, --net elsewhere; each accepts the other.
HIDDEN_SPELLINGS = {"net": "--student", "student": "--net"}


class Command(TyperCommand):
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
