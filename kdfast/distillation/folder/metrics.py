"""metrics.jsonl: the metrics of a run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kdfast.errors import DataError, OutputError
from kdfast.files import open_own, schemas
from kdfast.files.validate import decode_json

# The start of a row of metrics.jsonl, as far as a killed process has written it.
_ROW_START = b'{"step": '


class MetricsFile:
    """metrics.jsonl: one JSON object per line, append-only, without repeated steps.

    Opening the file cuts off an incomplete last line, as left by a killed process.

    Args:
        path: The file; created if missing.

    Raises:
        DataError: If the last line is not a metrics row.
        OutputError: If the file cannot be written, or is a symbolic link.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(open_own(path), "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        try:
            self.last_step = self._cut_incomplete_line()
        except BaseException:
            self._file.close()
            raise

    def _cut_incomplete_line(self) -> int:
        data = self._file.read()
        end = data.rfind(b"\n") + 1
        lines, rest = data[:end].splitlines(), data[end:]
        if not _ROW_START.startswith(rest[: len(_ROW_START)]):
            raise DataError(f"the last line of {self.path} is not a metrics row: move the file away")
        if rest:
            self._file.truncate(end)
        self._file.seek(end)
        if not lines:
            return -1
        where, advice = f"the last line of {self.path} is not a metrics row", "move the file away"
        return int(decode_json(lines[-1], schemas.MetricsRow, where, advice=advice)["step"])

    def append(self, row: Mapping[str, Any]) -> None:
        """Append a row, unless its step is already there."""
        if row["step"] <= self.last_step:
            return
        try:
            self._file.write(json.dumps(dict(row)).encode() + b"\n")
        except OSError as error:
            raise OutputError(f"cannot append to {self.path}: {error.strerror}: free space and run again") from error
        self.last_step = row["step"]

    def close(self) -> None:
        """Close the file."""
        self._file.close()
