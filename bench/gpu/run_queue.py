"""The queue: runs parts under their limits, records their states, and skips what is measured already."""

from __future__ import annotations

import datetime
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpu.part import AGAIN, SKIPPED, Part
from gpu.results import COMMITTED, ROOT, PartResults, hash_sources
from gpu.runner import Outcome, run

_LEAST = 5  # seconds with which no part is worth starting
_TAIL = 1500  # characters of the log that the state of a failed part keeps


class Queue:
    """One run of the queue.

    Args:
        out: Folder for results.jsonl, which starts as a copy of the committed results, and log.txt.
        work: Folder for what the parts build; a later run on the same machine goes on with it.
        device: `cpu` or `cuda`.
        minutes: Time limit of all parts together.
        committed: Results of earlier runs.
    """

    def __init__(self, out: Path, work: Path, device: str, *, minutes: float, committed: Path = COMMITTED) -> None:
        self.out, self.work, self.device = out.resolve(), work, device
        self.deadline = time.monotonic() + 60 * minutes
        self.name = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
        self.log = self.out / "log.txt"
        self.rows = self.out / "results.jsonl"
        self.grace = float(os.environ.get("QUEUE_GRACE", "10"))
        for folder in (self.out, work):
            folder.mkdir(parents=True, exist_ok=True)
        if committed.exists() and not self.rows.exists():
            shutil.copyfile(committed, self.rows)

    def run(self, parts: Sequence[Part]) -> int:
        """Run the parts in order; return 0 if each is done now or was before, or cannot run on this machine."""
        report = []
        good = True
        for part in parts:
            results = PartResults(self.rows, part.name, hash_sources(part.sources), self.name, self.device)
            state, note = self._run_part(part, results)
            failures = _failures(results)
            good = good and state in ("done", "known", "skipped") and not failures
            report.append(f"{part.name:20} {state:12} {note}{f', {failures} failed' if failures else ''}")
            print(f"== {report[-1]}", flush=True)
            if part.name == "machine" and state != "done":
                break  # without a device nothing can be measured
        print("\n".join(["", *report]))
        return 0 if good else 1

    def _run_part(self, part: Part, results: PartResults) -> tuple[str, str]:
        """Run one part and record its state; return the state and a note for the report."""
        if not part.always and results.state() == "done":
            return "known", f"{len(results.measured())} rows"
        left = self.deadline - time.monotonic()
        if left < _LEAST:
            return "no time", ""
        print(f"== {part.name}", flush=True)
        before, position = len(results.rows()), self.log.stat().st_size if self.log.exists() else 0
        outcome = self._execute(part, results, min(part.seconds, left))
        text = self.log.read_bytes()[position:].decode(errors="replace")
        added = [row for row in results.rows()[before:] if row["key"]]
        state = self._judge(part, results, outcome)
        values: dict[str, Any] = {
            "state": state,
            "exit": outcome.code,
            "seconds": round(outcome.seconds, 1),
            "rows": len(added),
        }
        if state == "skipped":
            values["reason"] = (text.strip().splitlines() or [""])[-1]
        elif state != "done":
            values["log"] = text[-_TAIL:]
            print(text[-_TAIL:])
        results.write("", **values)
        return state, values.get("reason") or f"{values['seconds']} s, {len(added)} rows"

    def _execute(self, part: Part, results: PartResults, seconds: float) -> Outcome:
        """Run the command, again for as long as it asks for that."""
        environment = {
            **os.environ,
            **results.environment(),
            "QUEUE_WORK": str(self.work),
            # Less than the part's own limit, so that a test that hangs is named and the others run.
            "QUEUE_TEST_SECONDS": os.environ.get("QUEUE_TEST_SECONDS") or str(0.6 * part.seconds),
            "KDFAST_RESULTS": str(self.work / "results"),
            "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": os.pathsep.join(self._search_path(part)),
        }
        with open(self.log, "a") as log:
            print(f"\n== {part.name} at {datetime.datetime.now(datetime.timezone.utc):%H:%M:%S} UTC", file=log)
        started = time.monotonic()
        while True:
            left = seconds - (time.monotonic() - started)
            outcome = run(
                [sys.executable, *part.command], self.log, left, environment=environment, folder=ROOT, grace=self.grace
            )
            left = seconds - (time.monotonic() - started)
            if outcome.code != AGAIN or left < _LEAST:
                return Outcome(outcome.code, time.monotonic() - started, outcome.cut or outcome.code == AGAIN)

    def _search_path(self, part: Part) -> list[str]:
        wheels = [str(self.work / "wheels")] if part.wheels else []
        return [*wheels, str(ROOT / "bench"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]

    def _judge(self, part: Part, results: PartResults, outcome: Outcome) -> str:
        if outcome.cut:
            return "cut"
        if outcome.code == SKIPPED:
            return "skipped"
        return "done" if outcome.code in part.finished and results.measured() else "failed"


def _failures(results: PartResults) -> int:
    """Return how many tests and measurements of a part failed for good."""
    rows = {row["key"]: row for row in results.rows() if row["key"]}
    return sum(row.get("outcome") in ("failed", "hung") for row in rows.values())
