"""The checkpoint of a search, from which the same call resumes after an interruption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from kdfast.errors import DataError, OutputError, describe_changes
from kdfast.files import matches_seal, read_json, schemas, seal, write_json
from kdfast.files.validate import check_type
from kdfast.pruning.if_beta.search import SearchState

_FORMAT = "kdfast-if-beta-search"
START_OVER = "delete it to start over"


class SearchCheckpoint:
    """A file with the state of one search.

    Args:
        path: The file; None disables saving.
        identity: Digest of everything that determines the search's outcome.
        settings: The same as JSON values, so that a message about another search can name what differs.
    """

    def __init__(self, path: Path | None, identity: str, settings: Mapping[str, Any] | None = None) -> None:
        self.path, self.identity = path, identity
        self.settings = json.loads(json.dumps(settings or {}))  # as they are read back: tuples as lists

    def load(self) -> SearchState | None:
        """Return the saved state, or None if there is none.

        Raises:
            OutputError: The file belongs to another search, or is not a checkpoint.
            DataError: It is damaged.
        """
        if self.path is None or not self.path.exists():
            return None
        content = read_json(self.path, error=OutputError, advice=f"{START_OVER}, or choose another output name")
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise OutputError(
                f"{self.path} is not the checkpoint of a search and would be overwritten: choose another output name"
            )
        if content.get("identity") != self.identity:
            difference = self._difference(content.get("settings"))
            raise OutputError(
                f"{self.path} is the checkpoint of another search ({difference}): resume that search with its own "
                "command and version of kdfast, choose another output name, or delete the file to start over"
            )
        check_type(content, schemas.SearchFile, self.path, advice=START_OVER)
        if not matches_seal(content):
            raise DataError(f"{self.path} was damaged or edited, it does not match its own digest: {START_OVER}")
        return SearchState(**content["state"])

    def save(self, state: SearchState) -> None:
        """Replace the file atomically.

        Raises:
            OutputError: The file cannot be written.
            DataError: The state contains values that are not finite.
        """
        if self.path is None:
            return
        content = {"format": _FORMAT, "identity": self.identity, "settings": self.settings, "state": state.to_dict()}
        try:
            write_json(self.path, seal(content))
        except ValueError as error:
            raise DataError(
                f"the state of the search cannot be saved ({error}): rewards must be finite; use another reward"
            ) from error

    def _difference(self, held: object) -> str:
        """Return what distinguishes this search from the one with the settings `held`."""
        if not isinstance(held, dict):
            return (
                "of a version of kdfast that saved no settings and computed the scores removal and absolute with the "
                "teacher's own head, not at its optimum"
            )
        return describe_changes(held, self.settings) or "of another version of kdfast, whose scores differ"


def digest(*parts: object) -> str:
    """Return the SHA-256, in hexadecimal, of the bytes of arrays and the repr of other objects."""
    total = hashlib.sha256()
    for part in parts:
        array = part.cpu().numpy() if isinstance(part, Tensor) else part
        if isinstance(array, np.ndarray):
            total.update(f"{array.dtype.str}{array.shape}".encode())
            total.update(np.ascontiguousarray(array).data)
        else:
            total.update(repr(part).encode())
    return total.hexdigest()
