"""The side file of a search: where it stands, so that the same call goes on after an interruption."""

from __future__ import annotations

from pathlib import Path

from kdfast.errors import DataError, OutputError
from kdfast.files import read_json, write_json
from kdfast.prune.if_beta.search import SearchState

_FORMAT = "kdfast-if-beta-search"


class SideFile:
    """A search's state on disk, or nowhere.

    Args:
        path: The file; None keeps nothing.
        identity: Digest of everything that decides the search's outcome.
    """

    def __init__(self, path: Path | None, identity: str) -> None:
        self.path, self.identity = path, identity

    def load(self) -> SearchState | None:
        """The state that is there, or None.

        Raises:
            OutputError: The file is another search's, or none at all.
        """
        if self.path is None or not self.path.exists():
            return None
        content = read_json(self.path, error=OutputError)
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise OutputError(f"{self.path} is no interrupted search and would be replaced; give another output name")
        if content.get("identity") != self.identity:
            raise OutputError(
                f"{self.path} is an interrupted search with other data or settings: go on with its own command, give "
                "another output name, or remove that file to begin anew"
            )
        try:
            return SearchState(**content["state"])
        except (KeyError, TypeError) as error:
            raise OutputError(f"{self.path} is damaged ({error}): remove it to begin anew") from error

    def save(self, state: SearchState) -> None:
        """Replace the file, atomically.

        Raises:
            OutputError: It cannot be written.
            DataError: The state is not made of finite numbers.
        """
        if self.path is None:
            return
        content = {"format": _FORMAT, "identity": self.identity, "state": state.to_dict()}
        try:
            write_json(self.path, content)
        except ValueError as error:
            raise DataError(f"the search's state cannot be saved: {error}; its rewards are not finite") from error
