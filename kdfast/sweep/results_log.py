"""results.jsonl: one JSON object per finished run, append-only, shared by any number of processes."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kdfast.errors import DataError, OutputError
from kdfast.files import matches_seal, open_own, refuse_links, schemas, seal, visible_entries, without_seal
from kdfast.files.validate import check_type, decode_json, read_regular

RESULTS = "results.jsonl"
RUNS = "runs"
_CLAIMS = ".claims"
# The start of a row, as far as a killed process has written it.
_ROW_START = b'{"key": "'
_ADVICE = "delete that line or move the file away"


class ResultsLog:
    """The rows of a sweep or a study, and the claims of processes on the rows they work on.

    The next writer cuts off a row that a killed process left unfinished. A row whose key exists is not written again.
    A claim is a lock on one byte of a file, so it ends with the process that holds it.

    Args:
        folder: Folder of the sweep; it must exist for `claim` and `append`.
        schema: What a row holds, a class of `kdfast.files.schemas`.
        what: What the rows are of, for messages.
    """

    def __init__(self, folder: Path, schema: type = schemas.SweepRow, what: str = "sweep") -> None:
        self.folder = folder
        self.path = folder / RESULTS
        self._schema, self._what = schema, what

    def rows(self) -> list[dict[str, Any]]:
        """Return all complete rows in the order they were written; change nothing.

        Raises:
            DataError: The file cannot be read, or a line other than an incomplete last one is not a row.
        """
        return [without_seal(row) for row in self._read()]

    def _read(self) -> list[dict[str, Any]]:
        try:
            return self._parse(read_regular(self.path))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise DataError(f"cannot read {self.path} ({error.strerror}): make it readable") from error

    def check_folder(self) -> None:
        """Check that the folder is missing or empty, or that of a sweep, and leads to no other. Writes nothing.

        Raises:
            OutputError: It holds something else, or a link in place of a folder of the sweep.
            DataError: results.jsonl is not that of a sweep.
        """
        entries = visible_entries(self.folder)
        begun = self.path.exists() or (self.folder / _CLAIMS).exists()
        if entries and not begun:
            raise OutputError(f"{self.folder} holds {entries[0]}, and no {self._what}: choose another `out`")
        for name in (RESULTS, _CLAIMS, RUNS):
            refuse_links(self.folder, name)
        self.rows()

    def results(self) -> list[dict[str, Any]]:
        """Return all complete rows, checked in full, for tables and messages.

        Raises:
            DataError: As `rows`, or a field is missing or has another type, or a row does not match its own digest.
        """
        rows = self._read()
        for number, row in enumerate(rows, 1):
            where = f"line {number} of {self.path}"
            check_type(row, self._schema, where, advice=_ADVICE)
            if not matches_seal(row):
                raise DataError(f"{where} was damaged or edited, it does not match its own digest: {_ADVICE}")
        return [without_seal(row) for row in rows]

    def done(self) -> set[str]:
        """Return the keys of all rows."""
        return {row["key"] for row in self.rows()}

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, unless its key exists; it is on the disk when this returns.

        Raises:
            OutputError: The file cannot be written.
            DataError: The file contains anything but rows.
        """
        line = json.dumps(seal(row), allow_nan=False).encode() + b"\n"
        try:
            with open(open_own(self.path), "r+b", buffering=0) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                data = file.read()
                if any(other["key"] == row["key"] for other in self._parse(data)):
                    return
                end = data.rfind(b"\n") + 1
                file.truncate(end)
                file.seek(end)
                if file.write(line) != len(line):
                    file.truncate(end)
                    raise OutputError(f"cannot append to {self.path}: the disk is full; free space and run again")
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot append to {self.path}: {error.strerror}; free space and run again") from error

    def begin(self) -> None:
        """Mark the existing folder as that of runs, before the first row.

        Raises:
            OutputError: The lock file cannot be written.
        """
        os.close(open_own(self.folder / _CLAIMS))

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Try to claim a row; yield whether this thread holds the claim, which ends with the block.

        Args:
            key: Key of the row, hexadecimal.

        Raises:
            OutputError: The lock file cannot be written.
        """
        byte = int(key[:15], 16)
        descriptor = open_own(self.folder / _CLAIMS)
        try:
            yield _lock_byte(descriptor, byte)
        finally:
            os.close(descriptor)

    def _parse(self, data: bytes) -> list[dict[str, Any]]:
        rest = data[data.rfind(b"\n") + 1 :]
        if not _ROW_START.startswith(rest[: len(_ROW_START)]):
            raise DataError(f"the last line of {self.path} is not a row of a {self._what}: move the file away")
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        return [
            decode_json(line, schemas.SweepKey, f"line {number} of {self.path}", advice=_ADVICE)
            for number, line in enumerate(lines, 1)
        ]


def _lock_byte(descriptor: int, byte: int) -> bool:
    """Try to lock one byte of a file for this descriptor alone; closing it releases the lock."""
    if sys.platform != "linux":  # a lock of the process, which its threads share
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
        except (BlockingIOError, PermissionError):
            return False
        return True
    # struct flock: type, whence, start, length, pid.
    request = struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except (BlockingIOError, PermissionError):
        return False
    return True
