"""Small students side by side on one GPU: eight runs of a sweep, one after the other or several at a time.

The time is that of the whole sweep, with what each run does alone: build, record its graphs, evaluate. A row digests
the weights of all students, which must not depend on how many train at a time.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu.data import TrainingData, training_data
from gpu.measure.training import wait
from gpu.results import PartResults, measure_missing
from kdfast.sweep.grid import SweepConfig
from kdfast.sweep.parallel.threads import run_threads
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.session import Session
from kdfast.sweep.spec import parse_methods
from kdfast.sweep.work import run_worker

# Network, precision, students, steps of each, and how many train at a time.
_RUN = {"cuda": ("resnet32", "bf16", 8, 2000, (1, 2, 4, 8)), "cpu": ("resnet8", "fp32", 2, 4, (1, 2))}
_BATCH = 64


def open_session(data: TrainingData, device: str, seeds: int, steps: int) -> Session:
    """Open a sweep of students of all of the data, with the cached teacher."""
    net, precision, *_ = _RUN[device]
    settings = {"student": net, "batch_size": _BATCH, "lr": 0.05, "schedule": "step", "precision": precision}
    return Session(
        SweepConfig(
            data=data.data, methods=parse_methods("random"), fractions=(1.0,), kd=(True,), seeds=tuple(range(seeds)),
            steps=steps, settings=settings, alpha="0.9", cache=data.cache, device=device,
        )
    )  # fmt: skip


def train(data: TrainingData, device: str, jobs: int, steps: int | None = None) -> dict[str, Any]:
    """Run the sweep with so many students at a time."""
    net, precision, students, full, _ = _RUN[device]
    session = open_session(data, device, students, steps or full)
    out = Path(os.environ["QUEUE_WORK"]) / "side-by-side"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    log, runs = ResultsLog(out), session.runs()
    together = jobs > 1 and (device == "cpu" or session.divide_device(jobs))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = wait(device)
    if together:
        run_threads(session, runs, log, jobs=jobs, keep_runs=False)
    else:
        run_worker(session, runs, log, keep_runs=False)
    seconds = wait(device) - started
    rows = sorted(log.results(), key=lambda row: row["seed"])
    return {
        "student": net,
        "precision": precision,
        "students": students,
        "steps": rows[0]["steps"],
        "threads": jobs if together else 1,
        "seconds": seconds,
        "images_per_second": sum(row["steps"] for row in rows) * _BATCH / seconds,
        "training_seconds": [row["seconds"] for row in rows],
        "memory": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "weights": hashlib.sha256("".join(row["weights"] for row in rows).encode()).hexdigest(),
    }


def main() -> None:
    """Measure the cases without a row, after a short sweep that compiles the kernels."""
    results = PartResults.from_environment()
    device, data = results.device, training_data(results.device)
    train(data, device, 1, steps=4)
    measure_missing(results, {f"{jobs} at a time": partial(train, data, device, jobs) for jobs in _RUN[device][4]})


if __name__ == "__main__":
    main()
