"""results.jsonl: one JSON object a line, each on disk before the next is measured.

A row has a part and a key, the hash of the sources behind it, the run that measured it, and its values. The row of a
part named `device` with the key of a run describes the machine. Rows without a key are the states of whole parts.
"""

from __future__ import annotations

import fcntl
import gc
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.part import AGAIN

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "bench" / "results" / "gpu" / "results.jsonl"
Row = dict[str, Any]

_SUFFIXES = {".py", ".cpp", ".h", ".cu", ".sh", ".toml", ".txt", ".yaml"}


def packed_folder() -> Path:
    """Return the folder of `gpu.pack_data`."""
    return Path(os.environ.get("DATA") or ROOT / ".gpu_data")


def read_rows(path: Path) -> list[Row]:
    """Return the rows of a file, without a last line that a killed process left incomplete; [] without a file."""
    rows = []
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_row(path: Path, row: Row) -> None:
    """Write a row as one line and wait until it is on disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # of several processes that run tests
        file.seek(0, os.SEEK_END)
        if file.tell() > 0:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a killed process left an incomplete line
                file.write(b"\n")
        file.write(json.dumps(row).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def hash_sources(paths: Iterable[str]) -> str:
    """Return a hash of the sources below some paths relative to the repository."""
    total = hashlib.sha256()
    for name in sorted(set(paths)):
        top = ROOT / name
        files = [top] if top.is_file() else sorted(p for p in top.rglob("*") if p.suffix in _SUFFIXES and p.is_file())
        if not files:
            raise FileNotFoundError(f"{name} holds no sources")
        for file in files:
            total.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes() + b"\0")
    return total.hexdigest()[:12]


@dataclass(frozen=True)
class PartResults:
    """The rows of one part in one run, as the part's own process sees them.

    Attributes:
        path: results.jsonl.
        part: Name of the part.
        sources: Hash of the sources that the part depends on.
        run: Name of the run.
        device: `cpu` or `cuda`.
    """

    path: Path
    part: str
    sources: str
    run: str
    device: str

    @classmethod
    def from_environment(cls) -> PartResults:
        """Return the results that the queue passes to its parts; without a queue, those of a file in this folder."""
        return cls(
            Path(os.environ.get("QUEUE_RESULTS", "results.jsonl")),
            os.environ.get("QUEUE_PART", "alone"),
            os.environ.get("QUEUE_SOURCES", ""),
            os.environ.get("QUEUE_RUN", "alone"),
            os.environ.get("DEVICE", "cuda"),
        )

    def environment(self) -> dict[str, str]:
        """Return the variables that `from_environment` reads."""
        return {
            "QUEUE_RESULTS": str(self.path),
            "QUEUE_PART": self.part,
            "QUEUE_SOURCES": self.sources,
            "QUEUE_RUN": self.run,
            "DEVICE": self.device,
        }

    def rows(self) -> list[Row]:
        """Return this part's rows that the present sources gave on a device of this kind."""
        wanted = {"part": self.part, "sources": self.sources, "kind": self.device}
        return [row for row in read_rows(self.path) if wanted.items() <= row.items()]

    def measured(self) -> set[str]:
        """Return the keys of the rows that need no second measurement."""
        return {row["key"] for row in self.rows() if row["key"] and not row.get("repeat")}

    def state(self) -> str | None:
        """Return the last state of the part: `done`, `failed`, `cut` or `skipped`; None if it never ran."""
        states = [row["state"] for row in self.rows() if not row["key"]]
        return states[-1] if states else None

    def write(self, key: str, **values: Any) -> None:
        """Append a row."""
        row = {"part": self.part, "key": key, "sources": self.sources, "kind": self.device, "run": self.run, **values}
        append_row(self.path, _rounded(row))

    def add(self, key: str, **values: Any) -> None:
        """Append a row and print it."""
        self.write(key, **values)
        shown = ", ".join(f"{name} {value}" for name, value in _rounded(values).items() if len(str(value)) < 60)
        print(f"{self.part}: {key}: {shown}", flush=True)


def measure_missing(results: PartResults, cases: Mapping[str, Callable[[], Mapping[str, Any]]]) -> None:
    """Measure the cases without a row, in order, and write their rows; an error costs no other row.

    Args:
        results: The part.
        cases: Key -> function that returns the values of its row.

    Raises:
        SystemExit: A case failed; with `AGAIN` if the CUDA context did not survive it.
    """
    failed, measured = [], results.measured()
    for key, measure in cases.items():
        if key in measured:
            continue
        try:
            results.add(key, **measure())
        except Exception as error:
            if _is_interruption(error):
                raise
            traceback.print_exc()
            failed.append(key)
            lost = not device_works()
            results.add(key, outcome="failed", error=f"{type(error).__name__}: {error}"[-500:], repeat=not lost)
            if lost:
                sys.exit(AGAIN)
        gc.collect()
        _release_memory()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def _is_interruption(error: Exception) -> bool:
    """Return whether kdfast stopped because of a signal."""
    errors = sys.modules.get("kdfast.errors")
    return errors is not None and isinstance(error, errors.Interrupted)


def device_works() -> bool:
    """Return whether the CUDA context, if there is one, still works."""
    torch = _torch_with_context()
    try:
        if torch is not None:
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _release_memory() -> None:
    torch = _torch_with_context()
    if torch is not None:
        torch.cuda.empty_cache()


def _torch_with_context() -> Any:
    """Return torch if it has a CUDA context, without importing it, which takes seconds; otherwise None."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_initialized() else None


def _rounded(value: Any) -> Any:
    """Return a value with its floats to six digits, which no measurement exceeds."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, (list, tuple)) else value
