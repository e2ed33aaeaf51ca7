"""The YAML file, or a run's config.json, that gives a command's options their defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from kdfast.cli.command import HIDDEN_SPELLINGS
from kdfast.cli.config.run import STARTED, options_of_run
from kdfast.errors import UsageError, did_you_mean
from kdfast.text import shorten_text

_SHOWN = 80  # characters of a key that is compared with the known ones


def load_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Read the defaults of a command's options from a YAML mapping, or from the config.json of a run.

    Options on the command line override them.

    Raises:
        UsageError: The file cannot be read, is not a mapping, or has a key or a value that the command does not accept.
    """
    if path is None:
        return None
    from kdfast.files.validate import read_yaml

    values = read_yaml(path, f"--config {path}")
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} is not a mapping: write one `option: value` per line")
    known = {
        spelling.lstrip("-"): parameter for parameter in context.command.params for spelling in _spellings(parameter)
    }
    if isinstance(values.get(STARTED), dict):
        values = options_of_run(values, known, str(path))
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        word = str(key).replace("_", "-")
        parameter = known.get(word)
        if parameter is None or parameter.name in ("config", "write_config", "help", "help_options"):
            shown = sorted(name for name, parameter in known.items() if not getattr(parameter, "hidden", False))
            hint = did_you_mean(word[:_SHOWN], shown)
            raise UsageError(f"--config {path}: no option {shorten_text(repr(key))}: {hint}known: {', '.join(shown)}")
        defaults[str(parameter.name)] = _default(
            f"--config {path}: {key} is {shorten_text(repr(value))}", word, value, parameter
        )
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


def _spellings(parameter: Any) -> list[str]:
    also = [HIDDEN_SPELLINGS[parameter.name]] if parameter.name in HIDDEN_SPELLINGS else []
    return [*parameter.opts, *parameter.secondary_opts, *also]


def _default(given: str, word: str, value: Any, parameter: Any) -> Any:
    """Return the value as the default of a parameter.

    Raises:
        UsageError: The value is of another kind; the message starts with `given`.
    """
    is_flag, several = getattr(parameter, "is_flag", False), getattr(parameter, "multiple", False)
    if value is None or isinstance(value, bool) != bool(is_flag):
        raise UsageError(f"{given}: write {'true or false' if is_flag else 'a value (words such as on in quotes)'}")
    if value == "" or (isinstance(value, str) and "\0" in value):
        raise UsageError(f"{given}: write a value without null characters that is not empty")
    if isinstance(value, dict) or (isinstance(value, list) and not several):
        raise UsageError(f"{given}, but that option has a single value: write one")
    if is_flag and f"--{word}" in parameter.secondary_opts:
        return not value
    return [value] if several and not isinstance(value, list) else value
