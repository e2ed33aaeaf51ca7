"""The options that the config.json of a run stands for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from kdfast.errors import UsageError

# Key of config.json with the paths; it tells the file of a run from a file of options.
STARTED = "started_with"

# Settings of a run that are options of the same name, with the values that also commands without the option have.
_SETTINGS: dict[str, Any] = {
    "epochs": None, "batch_size": None, "lr": None, "momentum": None, "weight_decay": None, "schedule": None,
    "warmup_epochs": None, "alpha": 0.0, "temperature": 4.0, "views": None, "view_seed": 0, "precision": None,
    "seed": None, "initial_epochs": None, "reshape_logits": False, "optimizer": "sgd", "label_smoothing": 0.0,
    "ema": 0.0, "clip": 0.0, "mixup": 0.0, "cutmix": 0.0,
    "steps": None,
}  # fmt: skip
_RENAMED = {"ce": "ce_weight", "terms_warmup_epochs": "kd_warmup_epochs"}
_PATHS = ("data", "subset", "cache", "teacher", "loader", "size", "order", "split", "augment")
# They change how a step is computed, not what is learned.
_EXECUTION = ("compile", "cuda_graph")


def options_of_run(saved: Mapping[str, Any], known: Collection[str], path: str) -> dict[str, Any]:
    """Return the options, by name, with which a command repeats a run.

    Args:
        saved: Content of the run's config.json.
        known: Names of the command's options, with hyphens.
        path: The file, for messages.

    Returns:
        Every setting of the run that is an option. The device, the folder and what only the progress depends on are
        left to the command.

    Raises:
        UsageError: The file is damaged, or the run has a setting that the command cannot have.
    """
    try:
        wanted = _collect(saved)
    except (AttributeError, KeyError, TypeError) as error:
        raise UsageError(f"--config {path} is the config.json of a run, and damaged ({error}): use another") from error
    for name in [name for name in wanted if name.replace("_", "-") not in known]:
        value = wanted.pop(name)
        if name not in _EXECUTION and value != _SETTINGS.get(name):
            raise UsageError(
                f"--config {path} is of a run with {name.replace('_', '-')} {value!r}, which this command does not "
                "have: use the command that made the run"
            )
    return wanted


def _collect(saved: Mapping[str, Any]) -> dict[str, Any]:
    started = saved[STARTED]
    found = {name: saved.get(name) for name in _SETTINGS}
    found |= {option: saved.get(name) for name, option in _RENAMED.items()}
    found |= {name: started.get(name) for name in (*_PATHS, *_EXECUTION)}
    found |= {
        "student": started.get("student_spec", saved["student"]),
        "init": started.get("init_path"),
        "tap": [f"{key}={place}" for key, place in saved.get("taps", {}).items()],
        "kd_term": [_write_term(term) for term in saved.get("terms", [])],
        "kd_weight": [term["weight"] for term in saved.get("terms", [])],
    }
    if found["steps"] is not None:
        found["epochs"] = None  # follows from the steps
    return {name: value for name, value in found.items() if value not in (None, [])}


def _write_term(term: Mapping[str, Any]) -> str:
    options = ",".join(f"{name}={value}" for name, value in term["options"].items())
    return f"{term['name']}:{options}" if options else str(term["name"])
