"""kdfast against others: kd_loss under torch.compile and Liger-Kernel, opacus, and a plain distillation loop.

Libraries that are not installed are left out of the rows.
"""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import bench_kd_loss
import plain_loop
import torch
from harness import device_timing

from gpu.data import training_data
from gpu.measure import gradients
from gpu.results import PartResults, measure_missing

# Classes, and rows on a GPU and on a CPU.
_LOSSES = {"cuda": [(1000, 16384), (100, 4096), (32000, 8192), (131072, 4096), (100, 128)], "cpu": [(100, 16)]}
_LOOP = {"cuda": ("resnet32", (64, 128), 2), "cpu": ("resnet8", (64,), 1)}  # student, batches, epochs
_OPACUS = {"cuda": [("resnet18", 128, 32), ("depthwise", 128, 32)], "cpu": [("depthwise", 2, 8)]}
_ROUNDS = {"cuda": 21, "cpu": 1}


def losses(c: int, n: int, device: str) -> dict[str, Any]:
    """Return the time of forward and backward of each implementation, which are checked first."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    arguments, functions = bench_kd_loss.inputs(n, c, dtype, torch.float16, device), bench_kd_loss.contenders(device)
    errors = bench_kd_loss.check(functions, arguments)
    timings = {
        name: device_timing(partial(bench_kd_loss.step, function, arguments), device, _ROUNDS[device])
        for name, function in functions.items()
    }
    return {
        "errors": errors,
        "graph": {name: timing.graph for name, timing in timings.items()},
        "ms": {name: timing.median * 1e3 for name, timing in timings.items()},
        "kdfast_is_faster": {name: timings["kdfast"].ratio_to(timing) for name, timing in timings.items()},
    }


def loop(student: str, batch: int, epochs: int, device: str) -> dict[str, Any]:
    """Return the rate of the plain loop."""
    data = training_data(device)
    workers = min(8, os.cpu_count() or 1) if device == "cuda" else 0
    rates = plain_loop.images_per_second(data.data, data.teacher, student, batch, epochs, device, workers)
    return {"student": student, "data": data.name, "workers": workers, "images_per_second": statistics.median(rates)}


def cases(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the measurements by key."""
    student, batches, epochs = _LOOP[device]
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for batch in batches:
        found[f"plain loop B={batch}"] = partial(loop, student, batch, epochs, device)
    for c, n in _LOSSES[device]:
        found[f"kd_loss C={c} N={n}"] = partial(losses, c, n, device)
    for name, n, side in _OPACUS[device]:
        found[f"opacus {name} N={n}"] = partial(gradients.network, name, n, side, device)
    return found


def main() -> None:
    """Measure the cases without a row."""
    results = PartResults.from_environment()
    todo = cases(results.device)
    for package in ("opacus", "liger_kernel"):
        if not importlib.util.find_spec(package):
            print(f"{package} is not installed: not compared")
            todo = {key: measure for key, measure in todo.items() if not key.startswith(package)}
    measure_missing(results, todo)


if __name__ == "__main__":
    main()
