"""The `kdfast distill` command that trains the student of a row."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.distillation.config import RunConfig
from kdfast.distillation.plan import Plan
from kdfast.reproduction.engine.config import ReproductionConfig

# Fields of `RunConfig` that have an option of another name, or more than one value.
_NAMES = {"ce": "ce-weight", "terms_warmup_epochs": "kd-warmup-epochs"}
_OTHERS = ("student", "alpha", "terms", "view_seed", "views")


def distill_command(plan: Plan, paths: Mapping[str, Path], out: Path, config: ReproductionConfig) -> str:
    """Return the command line that trains the same student from the same inputs.

    Args:
        plan: The plan of the run.
        paths: Paths of its inputs, by option.
        out: Folder of the run.
        config: How the data are opened.
    """
    run = plan.config
    words: list[Any] = ["kdfast", "distill", "--data", config.data, "--student", run.student]
    for name, path in paths.items():
        words += [f"--{name}", path]
    words += ["--alpha", run.alpha]
    defaults = {field.name: field.default for field in dataclasses.fields(RunConfig)}
    for name, default in defaults.items():
        value = getattr(run, name)
        if name not in _OTHERS and value != default:
            words += [f"--{_NAMES.get(name, name.replace('_', '-'))}", value]
    for term in run.terms:
        options = ",".join(f"{name}={value}" for name, value in term.options)
        words += ["--kd-term", f"{term.name}:{options}" if options else term.name, "--kd-weight", term.weight]
    if run.views != plan.source.view_spec.count:
        words += ["--views", run.views]
    for name, value, usual in (
        ("loader", config.loader, "auto"), ("size", config.size, None), ("order", config.order, "path"),
        ("split", config.split, None),
    ):  # fmt: skip
        if value != usual:
            words += [f"--{name}", value]
    if plan.device.type != "cpu":
        words += ["--device", plan.device]
    return shlex.join(map(str, [*words, "--out", out]))
