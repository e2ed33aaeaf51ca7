"""Options that several commands share, and the YAML file that gives them defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from kdfast.errors import UsageError


def load_defaults(context: typer.Context, path: Path | None) -> Path | None:
    """Take the options' defaults from a YAML mapping; what stands on the command line overrides it.

    Raises:
        UsageError: If the file cannot be read, is not a mapping, or names an option the command does not have.
    """
    if path is None:
        return None
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config {path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} holds no mapping; write one `option: value` a line")
    known = {
        flag.lstrip("-"): parameter
        for parameter in context.command.params
        for flag in (*parameter.opts, *parameter.secondary_opts)
    }
    defaults: dict[str, Any] = {}
    for key, value in values.items():
        parameter = known.get(str(key).replace("_", "-"))
        if parameter is None or parameter.name in (None, "config", "help"):
            raise UsageError(f"--config {path}: no option {key}; known: {', '.join(sorted(known))}")
        if value is None or isinstance(value, bool) != bool(getattr(parameter, "is_flag", False)):
            raise UsageError(f"--config {path}: {key} is {value!r}, which that option does not take; see --help")
        several = getattr(parameter, "multiple", False)
        if isinstance(value, dict) or (isinstance(value, list) and not several):
            raise UsageError(f"--config {path}: {key} is {value!r}, and that option takes a single value")
        defaults[str(parameter.name)] = [value] if several and not isinstance(value, list) else value
    context.default_map = {**(context.default_map or {}), **defaults}
    return path


Data = Annotated[
    str,
    typer.Option(
        "--data",
        help="CIFAR-10/100 python archives, SVHN .mat, an image folder, an .npz, betons written by `kdfast data "
        "convert`, or the word digits.",
        metavar="PATH",
    ),
]
Size = Annotated[
    int | None,
    typer.Option("--size", help="Image folders of larger or mixed images: store them as SIZE x SIZE squares.", min=1),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.", min=0, max=2**63 - 1)]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check the inputs, say what would be done, write nothing.")]
Out = Annotated[Path, typer.Option("--out", help="Where to write.")]
Config = Annotated[
    Path | None,
    typer.Option("--config", help="YAML file with defaults; flags override it.", is_eager=True, callback=load_defaults),
]
Loader = Annotated[str, typer.Option("--loader", help="auto, ffcv or resident.")]
