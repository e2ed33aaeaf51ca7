"""Peak resident memory of a training run with the FFCV loader and a memory-mapped cache of all 162 views.

    python bench/bench_memory.py --data cifar-100-python [--student resnet8]

The cache has its full size (1.62 GB for CIFAR-100). Its logits are random numbers, which take the same memory. The run
is the `kdfast distill` command in its own process, for one epoch of the whole split.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import psutil
from bench_cache import RandomPredictor
from harness import write_results

from kdfast.data.ffcv.write import convert
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache

LIMIT_BYTES = 1.5e9


def measure(command: list[str]) -> tuple[int, float]:
    """Run a command and return its peak resident memory in bytes, including children, and its time in seconds."""
    started, peak = time.perf_counter(), 0
    process = psutil.Popen(command, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            processes = [process, *process.children(recursive=True)]
            peak = max(peak, sum(each.memory_info().rss for each in processes))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.05)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}")
    return peak, time.perf_counter() - started


def main() -> None:
    """Build the files, run the command, print the result and write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--student", default="resnet8")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        betons, cache, run = Path(name) / "betons", Path(name) / "cache", Path(name) / "run"
        source = convert(open_source(options.data), betons)
        classes = len(source.classes)
        model = Model(build_net("resnet8", classes).eval(), "resnet8", classes, source.classes,
                      compute_normalization(source.train))  # fmt: skip
        with mock.patch("kdfast.teacher.build.Predictor", RandomPredictor):
            build_cache(source, model, cache)
        size = sum(file.stat().st_size for file in cache.iterdir())
        peak, seconds = measure(
            [sys.executable, "-m", "kdfast", "distill", "--data", str(betons), "--cache", str(cache), "--student",
             options.student, "--epochs", "1", "--loader", "ffcv", "--alpha", "0.5", "--out", str(run)]
        )  # fmt: skip
        result = json.loads((run / "result.json").read_text())
    verdict = "under" if peak < LIMIT_BYTES else "OVER"
    print(
        f"{result['images']} images of {options.data}, loader {result['loader']}, cache of {size / 1e9:.2f} GB "
        f"({result['views']} views): peak resident memory {peak / 1e9:.2f} GB, {verdict} {LIMIT_BYTES / 1e9:.1f} GB "
        f"({seconds:.0f} s)"
    )
    write_results("memory", [{"peak_bytes": peak, "cache_bytes": size, "images": result["images"]}])


if __name__ == "__main__":
    main()
