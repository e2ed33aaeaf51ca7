"""Small students on a CPU: one process of all threads against one process per thread, speed and memory.

    python bench/bench_jobs.py --data cifar-10-batches-py [--students resnet8,resnet20] [--rounds 3] [--steps 150]

Both settings train the same sweep, in turn, and must write the same rows up to the rounding of other thread counts. The
speed is that of the training loops alone: the mean images per second of a run times the runs at a time. The memory is
the proportional set size (PSS) of the command and its processes, in which a page that n processes share counts as 1/n
in each, when it is largest.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import table, write_results

BATCH = 64


def proportional_bytes(pid: int) -> int:
    """Return the PSS of a process and its descendants; 0 for those that have ended."""
    total, pids = 0, [pid]
    while pids:
        one = pids.pop()
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            total += next(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            pids += map(int, Path(f"/proc/{one}/task/{one}/children").read_text().split())
        except (OSError, StopIteration):
            continue
    return total


def train(data: str, student: str, threads: int, jobs: int, steps: int) -> dict[str, float]:
    """Run a sweep of as many runs as there are threads; return its images per second and its largest PSS."""
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable, "-m", "kdfast", "sweep", "--data", data, "--student", student, "--kd", "off", "--fractions",
            "0.1", "--seeds", ",".join(map(str, range(threads))), "--steps", str(steps), "--jobs", str(jobs),
            "--device", "cpu", "--out", out,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            peak = max(peak, proportional_bytes(process.pid))
            time.sleep(0.5)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
        rows = [json.loads(line) for line in (Path(out) / "results.jsonl").read_text().splitlines()]
        rates = [row["steps"] * BATCH / row["seconds"] for row in rows]
        return {"rate": jobs * statistics.mean(rates), "bytes": peak}


def main() -> None:
    """Measure and print one table; write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--students", default="resnet8,resnet20")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for student in options.students.split(","):
        found: dict[int, list[dict[str, float]]] = {1: [], options.threads: []}
        for _ in range(options.rounds):
            for jobs, results in found.items():
                results.append(train(options.data, student, options.threads, jobs, options.steps))
        ratios = [many["rate"] / one["rate"] for one, many in zip(*found.values(), strict=True)]
        for jobs, results in found.items():
            rates = [result["rate"] for result in results]
            rows.append(
                {
                    "student": student,
                    "processes x threads": f"{jobs} x {options.threads // jobs}",
                    "images/s": round(statistics.median(rates)),
                    "range": f"{min(rates):.0f} to {max(rates):.0f}",
                    "ratio": 1.0 if jobs == 1 else round(statistics.median(ratios), 2),
                    "PSS in MB": round(max(result["bytes"] for result in results) / 1e6),
                }
            )
    print(table(rows))
    write_results("jobs", rows, batch_size=BATCH, steps=options.steps, rounds=options.rounds)


if __name__ == "__main__":
    main()
