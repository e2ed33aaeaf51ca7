"""Folder of a run: config, metrics, status, result, checkpoints and student, each written atomically."""

from __future__ import annotations

from kdfast.distillation.folder.clean import Cleaned, clean_run
from kdfast.distillation.folder.content import (
    CHECKPOINTS,
    METADATA_KEY,
    RESULT,
    RUN_FILES,
    check_run_folder,
    is_run_config,
    read_finished_run,
    read_result,
)
from kdfast.distillation.folder.metrics import MetricsFile
from kdfast.distillation.folder.run import RunFolder

__all__ = [
    "CHECKPOINTS",
    "METADATA_KEY",
    "RESULT",
    "RUN_FILES",
    "Cleaned",
    "MetricsFile",
    "RunFolder",
    "check_run_folder",
    "clean_run",
    "is_run_config",
    "read_finished_run",
    "read_result",
]
