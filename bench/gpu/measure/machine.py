"""First part: what the results depend on, and the bandwidth of a copy."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from typing import Any

import torch
from harness import copy_bandwidth, machine

from gpu.results import PartResults

_QUERY = (
    "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,power.draw,"
    "temperature.gpu,pstate"
)
COPY_BYTES = {"cuda": 1 << 33, "cpu": 1 << 26}


def output(*command: str) -> str | None:
    """Return what a command prints, or None if it is missing, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def clocks() -> dict[str, str]:
    """Return what nvidia-smi reports now; empty without nvidia-smi."""
    line = output("nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader", "--id=0")
    return dict(zip(_QUERY.split(","), line.split(", "), strict=False)) if line else {}


def version(package: str) -> str | None:
    """Return the installed version of a package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, Any]:
    """Return the versions of libraries and compilers."""
    nvcc = re.search(r"release ([\d.]+)", output("nvcc", "--version") or "")
    return {
        **{name: version(name) for name in ("triton", "numpy", "numba", "opacus", "liger-kernel", "torchvision")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nvcc": nvcc[1] if nvcc else None,
    }


def device_properties() -> dict[str, Any]:
    """Return the properties of the GPU that torch sees."""
    found = torch.cuda.get_device_properties(0)
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "memory_bytes": found.total_memory,
        "l2_bytes": found.L2_cache_size,
    }


def main() -> None:
    """Record the machine under the name of the run."""
    results = PartResults.from_environment()
    cuda = results.device == "cuda"
    if cuda and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device: run with DEVICE=cpu, or where there is one")
    idle = clocks()
    size = COPY_BYTES[results.device]
    bandwidth = copy_bandwidth(size, results.device)
    facts = machine()
    if os.environ.get("COMMIT"):  # of a copy without .git
        facts["commit"] = os.environ["COMMIT"]
    results.add(
        results.run,
        copy_bytes_per_second=bandwidth,
        copy_bytes=size,
        name=device_properties()["name"] if cuda else facts["cpu"],
        gpu=device_properties() if cuda else None,
        idle=idle,
        busy=clocks(),
        **{key: value for key, value in facts.items() if key != "gpu"},
        versions=versions(),
    )


if __name__ == "__main__":
    main()
