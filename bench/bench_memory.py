"""Peak resident memory of a training run with the FFCV loader and a memory-mapped cache of all 162 views.

    python bench/bench_memory.py --data cifar-100-python [--student resnet8]

The cache has its full size (1.62 GB for CIFAR-100). Its logits are random numbers, which take the same memory. The run
is the `kdfast distill` command in its own process, for one epoch of the whole split.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from unittest import mock

from bench_cache import RandomPredictor
from harness import measure_kdfast, write_results

from kdfast.data.ffcv.write import convert
from kdfast.data.readers.registry import open_source
from kdfast.data.source import compute_normalization
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache

LIMIT_BYTES = 1.5e9


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
        usage = measure_kdfast(
            "distill", "--data", betons, "--cache", cache, "--student", options.student, "--epochs", 1,
            "--loader", "ffcv", "--alpha", 0.5, "--out", run,
        )  # fmt: skip
        peak, seconds = usage.rss, usage.seconds
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
