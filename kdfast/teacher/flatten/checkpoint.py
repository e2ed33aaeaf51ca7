"""The state of a flattening on disk, from which the same call resumes after an interruption.

The file is a plain dict (format, settings, step, seconds, tensors, seal), saved by ``torch.save``, written atomically
and read with ``weights_only=True``. The seal covers everything else in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kdfast.errors import CheckpointError, OutputError, describe_changes
from kdfast.files import atomic_write, check_replaceable, schemas, sha256_json
from kdfast.files.validate import check_type
from kdfast.nets.checkpoint import digest_of
from kdfast.nets.foreign import read_torch_file
from kdfast.teacher.flatten.flattener import Flattener

_FORMAT = "kdfast-flatten"


def _read(path: Path) -> dict[str, Any] | None:
    """Return the content of a state, or None if the file holds anything else."""
    try:
        content = read_torch_file(path)
    except CheckpointError:
        return None
    return content if isinstance(content, dict) and content.get("format") == _FORMAT else None


class FlattenCheckpoint:
    """A file with the state of one flattening.

    Args:
        path: The file; None disables saving.
        settings: Everything that determines the outcome, as JSON values.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings = json.loads(json.dumps(settings))  # as they are read back: tuples as lists

    def delete(self) -> None:
        """Delete the file, also that of other settings.

        Raises:
            OutputError: It is not the state of a flattening.
        """
        if self.path is not None:
            check_replaceable(self.path, lambda path: _read(path) is not None)
            self.path.unlink(missing_ok=True)

    def check(self) -> dict[str, Any] | None:
        """Return the content of the file, or None if there is none.

        Raises:
            OutputError: The file belongs to a flattening with other settings, or is something else, or damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        advice = "delete it to start over, or choose another output name"
        content = _read(self.path)
        if content is None:
            raise OutputError(f"{self.path} is not the state of a flattening and would be overwritten: {advice}")
        try:
            fields = {name: value for name, value in content.items() if name != "tensors"}
            check_type(fields, schemas.FlattenState, self.path, error=OutputError, advice=advice)
            sealed = content["seal"] == _seal(content)
        except (KeyError, TypeError, ValueError, AttributeError):
            sealed = False
        if not sealed:
            raise OutputError(f"{self.path} is damaged: its content does not match its seal; {advice}")
        if changes := describe_changes(content["settings"], self._settings):
            raise OutputError(f"{self.path} is the state of another flattening ({changes}): {advice}")
        return content

    def load(self, flattener: Flattener) -> None:
        """Restore the saved state, if there is one.

        Raises:
            OutputError: As in `check`.
            CheckpointError: The state does not fit the network.
        """
        content = self.check()
        if content is not None:
            flattener.restore(content["step"], content["seconds"], content["tensors"])

    def save(self, flattener: Flattener) -> None:
        """Replace the file atomically.

        Raises:
            OutputError: The file cannot be written.
        """
        if self.path is None:
            return
        content = {
            "format": _FORMAT,
            "settings": self._settings,
            "step": flattener.step,
            "seconds": flattener.seconds,
            "tensors": {name: x.cpu().contiguous() for name, x in flattener.tensors().items()},
        }
        with atomic_write(self.path) as file:
            torch.save({**content, "seal": _seal(content)}, file)


def _seal(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hexadecimal) of everything but the seal itself."""
    fields = {name: value for name, value in content.items() if name not in ("tensors", "seal")}
    return sha256_json({**fields, "tensors": digest_of(content["tensors"])})
