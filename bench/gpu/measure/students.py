"""Whole runs of `kdfast distill`: ResNet-32 on a tenth of the data, with the cached teacher and without one.

The arguments are the seeds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from gpu.data import TrainingData, training_data
from gpu.part import SKIPPED
from gpu.results import ROOT, PartResults, measure_missing
from kdfast.distillation.losses.alpha import compute_alpha

# Network, epochs, precision.
_RUN = {"cuda": ("resnet32", 240, "bf16"), "cpu": ("resnet8", 2, "fp32")}
_KEEP = ("test_top1", "test_top5", "steps", "images", "seconds", "images_per_second", "alpha", "views", "cost_seconds")


def distill(data: TrainingData, teacher: bool, device: str, seed: int) -> dict[str, Any]:
    """Run the command and return its result, with the seconds from start to end."""
    net, epochs, precision = _RUN[device]
    out = Path(os.environ["QUEUE_WORK"]) / f"student-{'kd' if teacher else 'plain'}-{seed}"
    # The packed images are all that the command sees, so that it cannot know which share of the data they are.
    options = ["--cache", data.cache, "--alpha", str(compute_alpha(data.fraction))] if teacher else ["--alpha", "0"]
    command = [
        sys.executable, "-m", "kdfast", "distill", "--data", data.data, "--student", net, "--epochs", str(epochs),
        "--precision", precision, "--device", device, "--seed", str(seed), "--out", str(out), *options,
    ]  # fmt: skip
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    elapsed = time.perf_counter() - started
    result = json.loads((out / "result.json").read_text())
    facts = {"student": net, "epochs": epochs, "precision": precision, "data": data.name, "command_seconds": elapsed}
    return {**facts, **{name: result[name] for name in _KEEP}}


def main() -> None:
    """Run the students without a row."""
    results = PartResults.from_environment()
    data = training_data(results.device)
    if results.device == "cuda" and not data.packed:
        print("no packed data: run gpu.pack_data, and pass its folder in DATA")
        sys.exit(SKIPPED)
    seeds = [int(argument) for argument in sys.argv[1:]]
    cases = {
        f"{'KD' if teacher else 'no KD'}, seed {seed}": partial(distill, data, teacher, results.device, seed)
        for seed in seeds
        for teacher in (True, False)
    }
    measure_missing(results, cases)


if __name__ == "__main__":
    main()
