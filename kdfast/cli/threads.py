"""Threads of a command: as many as it may use, and they soon sleep while they wait.

OpenMP's threads spin while they wait for each other. On a machine that others use too, a spinning thread keeps from its
core the one that it waits for, and training becomes several times slower; see `bench/bench_threads.py`. On a quiet
machine it costs next to nothing if they spin briefly first.

OpenMP reads its settings when torch loads it, so they are set before. The library itself sets nothing: it runs inside
other people's programs.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

WAIT_SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
_CPU_LIMITS = (Path("/sys/fs/cgroup/cpu.max"), Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
_PERIOD = Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")


def configure_threads() -> None:
    """Set OpenMP's environment variables that the user has not set; call it before torch is imported."""
    if not any(name in os.environ for name in WAIT_SETTINGS):
        # A thread that spins briefly loses little on a quiet machine; one that sleeps at once loses a fifth.
        os.environ["GOMP_SPINCOUNT"] = "1000"
    cores, allowed = _usable_cores(), cpu_limit()
    if "OMP_NUM_THREADS" not in os.environ and allowed < cores:
        os.environ["OMP_NUM_THREADS"] = str(max(1, math.floor(allowed)))


def describe_threads(count: int) -> str:
    """Describe the threads of this process in a line: `count` is the number that torch uses."""
    setting = next((f"{name}={os.environ[name]}" for name in WAIT_SETTINGS if name in os.environ), "they spin")
    limit = cpu_limit()
    cores = f"{_usable_cores()} usable" + (f", limited to {limit:g}" if math.isfinite(limit) else "")
    return f"{cores}; torch uses {count} threads; waiting: {setting}"


def cpu_limit() -> float:
    """Return the CPU time that the container allows, in cores; infinity if it sets no limit."""
    try:
        if _CPU_LIMITS[0].is_file():
            quota, period = _CPU_LIMITS[0].read_text().split()
        else:
            quota, period = _CPU_LIMITS[1].read_text().strip(), _PERIOD.read_text().strip()
        return int(quota) / int(period) if quota not in ("max", "-1") else math.inf
    except (OSError, ValueError):
        return math.inf


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
