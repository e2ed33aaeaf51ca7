"""Open what was trained: a model's file, or the folder of a run with what it recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kdfast.distillation.folder import METADATA_KEY, is_run_config, read_finished_run
from kdfast.errors import CheckpointError, DataError, UsageError
from kdfast.files import read_json
from kdfast.nets.checkpoint import Model, load_model

INPUT_SIZE = "input_size"
"""Key of a model's metadata: height and width of the images that it was trained on."""

STUDENT = "student.pt"


@dataclass(frozen=True)
class Trained:
    """A model and what is known about its training.

    Attributes:
        path: Its file.
        model: The model, in evaluation mode on the CPU.
        size: Height and width of its images in pixels.
        config: config.json of the run; empty without a run.
        result: result.json of the run; empty without a run.
    """

    path: Path
    model: Model
    size: tuple[int, int]
    config: Mapping[str, Any] = field(default_factory=dict)
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Paths of the run's inputs and the versions of its software, where known."""
        found: Mapping[str, Any] = self.config.get(METADATA_KEY, {})
        return found


def open_trained(path: Path, size: tuple[int, int] | None = None) -> Trained:
    """Open a model, with the run that made it if there is one.

    Args:
        path: The folder of a finished run, or a model's file. Beside `student.pt`, and in FILE.run, its run is looked
            for.
        size: Height and width of the images; None for those that the run or the file records.

    Raises:
        DataError: There is nothing, or a folder without a run.
        CheckpointError: The run is not finished, or the model is damaged.
        UsageError: The size is not recorded and not given.
    """
    if path.is_dir():
        file, folder = path / STUDENT, path
        if not is_run_config(path / "config.json"):
            raise DataError(f"{path} holds no run: pass the folder of a run, or a model's file")
    else:
        file = path
        folder = path.parent if path.name == STUDENT else path.with_name(f"{path.name}.run")
    config, result = _read_run(folder)
    if path.is_dir() and not result:
        raise CheckpointError(f"{path} holds a run that is not finished: finish it first, with the same command")
    model = load_model(file)
    if result and result["weights"] != model.digest:  # a file of another run, or a changed one
        config, result = {}, {}
    recorded = size or _recorded_size(config, model)
    if recorded is None:
        raise UsageError(f"{file} does not record the size of its images: pass `size`, the side of an image in pixels")
    return Trained(file, model, recorded, config, result)


def _read_run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config.json and result.json of a finished run; empty ones if there is none."""
    if not is_run_config(folder / "config.json"):
        return {}, {}
    result = read_finished_run(folder)
    return ({}, {}) if result is None else (dict(read_json(folder / "config.json")), result)


def _recorded_size(config: Mapping[str, Any], model: Model) -> tuple[int, int] | None:
    for found in (model.metadata.get(INPUT_SIZE), config.get("augmentation", {}).get("size")):
        if isinstance(found, (list, tuple)) and len(found) == 2 and all(isinstance(n, int) and n > 0 for n in found):
            return found[0], found[1]
    return None
