"""NVIDIA's tools on small cases: `sanitizer` (memcheck and racecheck) and `counters` (Nsight Compute).

    python -m gpu.measure.tools sanitizer|counters

Without the tool, the cases run alone, and the part is skipped.
"""

from __future__ import annotations

import csv
import glob
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from gpu.measure.small_cases import GROUPS, PROFILED
from gpu.part import SKIPPED
from gpu.results import PartResults, measure_missing

_PLACES = ("/usr/local/cuda*/bin", "/opt/nvidia/nsight-compute/*", "/usr/local/cuda*/compute-sanitizer")
_SECONDS = 200
_ERRORS = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)")
_METRICS = (
    "gpu__time_duration.sum", "dram__bytes.sum", "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed", "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active", "sm__warps_active.avg.pct_of_peak_sustained_active",
    "launch__registers_per_thread", "launch__grid_size", "launch__block_size",
    "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "smsp__average_warps_issue_stalled_math_pipe_throttle_per_issue_active.ratio",
)  # fmt: skip


def find(name: str) -> str | None:
    """Return the path of a tool on PATH or in CUDA's folders."""
    places = [folder for pattern in _PLACES for folder in sorted(glob.glob(pattern), reverse=True)]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(places))


def call(group: str, device: str, *tool: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a group of cases, below a tool if one is given, and print what it prints."""
    command = [*tool, sys.executable, "-m", "gpu.measure.small_cases", group, device]
    done = subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=_SECONDS
    )
    print(done.stdout[-4000:], done.stderr[-4000:], flush=True)
    return done


def alone(group: str, device: str) -> dict[str, Any]:
    """Run the cases without a tool."""
    done = call(group, device)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}: {done.stderr[-300:]}")
    return {"exit": 0}


def sanitized(path: str, tool: str, group: str) -> dict[str, Any]:
    """Return the errors that compute-sanitizer found."""
    # Out-of-bounds accesses between two blocks of one allocation stay hidden with PyTorch's memory pool.
    done = call(group, "cuda", path, "--tool", tool, "--error-exitcode", "99", PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    found = _ERRORS.search(done.stdout + done.stderr)
    if found is None:
        raise RuntimeError(f"no summary, exit code {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    errors = int(found[1])
    if errors or done.returncode:
        raise RuntimeError(f"{errors} errors, exit code {done.returncode}: {done.stdout[-400:]}")
    return {"errors": errors}


def counted(path: str, group: str) -> dict[str, Any]:
    """Return the counters of each kernel of one call."""
    options = ("--profile-from-start", "off", "--clock-control", "none", "--csv", "--metrics", ",".join(_METRICS))
    done = call(group, "cuda", path, *options)
    kernels = parse(done.stdout)
    if not kernels:
        raise RuntimeError(f"no kernels, exit code {done.returncode}: {(done.stdout + done.stderr)[-300:]}")
    return {"kernels": kernels}


def parse(text: str) -> list[dict[str, Any]]:
    """Return one dictionary of metrics for each kernel in the CSV output of ncu."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"][:120]})
        value, unit = row["Metric Value"].replace(",", ""), row["Metric Unit"]
        kernel[row["Metric Name"]] = [float(value), unit] if re.fullmatch(r"[-\d.e+]+", value) else value
    return list(kernels.values())


def main(kind: str) -> None:
    """Run the cases without a row."""
    results = PartResults.from_environment()
    device = results.device
    groups = list(GROUPS) if kind == "sanitizer" else [f"dense-{c}" for c in PROFILED]
    path = find("compute-sanitizer" if kind == "sanitizer" else "ncu") if device == "cuda" else None
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        f"{group} alone": partial(alone, group, device) for group in groups
    }
    if path and kind == "sanitizer":
        for tool in ("memcheck", "racecheck"):
            cases |= {f"{tool} {group}": partial(sanitized, path, tool, group) for group in groups}
    elif path:
        cases |= {group: partial(counted, path, group) for group in groups}
    measure_missing(results, cases)
    if path is None:
        print("compute-sanitizer is not installed" if kind == "sanitizer" else "ncu is not installed")
        sys.exit(SKIPPED)


if __name__ == "__main__":
    main(sys.argv[1])
