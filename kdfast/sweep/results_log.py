"""results.jsonl: one JSON object a finished run, append-only, shared by any number of processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdfast.errors import DataError, OutputError

RESULTS = "results.jsonl"
_CLAIMS = ".claims"


class Ledger:
    """The rows of a sweep, and who is working on which.

    A row that a killed process left unfinished is cut off by the next writer; a row whose key is there already is not
    written again. Claims are locks, one byte of a file a row, so they die with the process that holds them.

    Args:
        folder: The sweep's folder; it must exist for claims and for `append`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / RESULTS

    def rows(self) -> list[dict[str, Any]]:
        """All whole rows, in the order in which they were written; nothing is changed.

        Raises:
            DataError: If the file cannot be read, or a line other than a torn last one is no row.
        """
        try:
            return _parse(self.path, self.path.read_bytes())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(f"cannot read {self.path}: {error.strerror}") from error

    def done(self) -> set[str]:
        """Keys of the rows that are there."""
        return {row["key"] for row in self.rows()}

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row, unless its key is there; on the disk when this returns.

        Raises:
            OutputError: If the file cannot be written.
            DataError: If it holds something else than rows.
        """
        line = json.dumps(dict(row), allow_nan=False).encode() + b"\n"
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with open(descriptor, "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                data = file.read()
                if any(held["key"] == row["key"] for held in _parse(self.path, data)):
                    return
                whole = data.rfind(b"\n") + 1
                file.truncate(whole)
                file.seek(whole)
                if file.write(line) != len(line):
                    file.truncate(whole)
                    raise OutputError(f"cannot append to {self.path}: the disk is full; free space and run again")
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot append to {self.path}: {error.strerror}; free space and run again") from error

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Try to take a row: True inside the block for the only process that has it.

        Args:
            key: The row's, hexadecimal.

        Raises:
            OutputError: If the folder takes no lock.
        """
        byte = int(key[:15], 16)
        path = self.folder / _CLAIMS
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error.strerror}; repair the folder or choose another") from error
        try:
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                held = True
            except (BlockingIOError, PermissionError):
                held = False
            yield held
        finally:
            os.close(descriptor)


def _parse(path: Path, data: bytes) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        try:
            row = json.loads(line)
            row["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"line {number} of {path} is no row of a sweep; delete that line or move the file away"
            ) from error
        rows.append(row)
    return rows
