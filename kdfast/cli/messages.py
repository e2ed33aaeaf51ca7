"""Rewrite the library's error messages in terms of the running command.

The library names its arguments in backticks: "`batch_size` is 0: pass at least 1". On the command line that argument
is an option, so the message becomes "--batch-size is 0: pass at least 1".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

# Names the library uses for an argument, and the parameters of commands that set it.
ALIASES = {
    "student": ("net",),
    "net": ("student",),
    "teacher_net": ("model_net",),
    "fraction": ("fractions",),
    "fractions": ("fraction",),
    "seed": ("seeds",),
    "method": ("methods",),
    "options": ("option",),
    "score_options": ("score_option",),
    "n_views": ("views",),
    "folder": ("out",),
    "normalization": ("mean",),
    "jpeg_quality": ("jpeg",),
    "ce": ("ce_weight",),
    "terms": ("kd_term",),
    "terms_warmup_epochs": ("kd_warmup_epochs",),
}

_BACKTICKED = re.compile(r"`([A-Za-z_]\w*)`")


def find_command(root: Any, words: Iterable[str]) -> Any:
    """Return the command that a command line runs.

    Args:
        root: The click command of the whole program.
        words: The command line without the program's name.
    """
    command = root
    for word in words:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    return command


def translate(message: str, command: Any) -> str:
    """Replace each `` `argument` `` by the option that sets it, on one line.

    Backticks are dropped around a name that is no option of the command.

    Args:
        message: An error message of the library.
        command: The running click command.
    """
    spellings = {parameter.name: _spelling(parameter) for parameter in command.params}

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        return next((spellings[key] for key in (name, *ALIASES.get(name, ())) if key in spellings), name)

    return " ".join(_BACKTICKED.sub(replace, message).split())


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.metavar or parameter.name.upper())
    return str(next((word for word in parameter.opts if word.startswith("--")), parameter.opts[0]))
