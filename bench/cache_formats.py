"""Students of caches that hold all classes, the ten most probable ones, or features: one resumable command, one table.

    python bench/cache_formats.py --data cifar-100-python --teacher resnet32.pt --out runs/formats

Each step is a `kdfast` command, printed before it runs. For each seed, a random tenth is cached on 40 views in each
format; a ResNet-20 then trains on it for 40 epochs, so that no view comes twice. Rows go to
bench/results/cache_formats.jsonl; the table shows each seed and the mean difference from all classes with its 95%
interval.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from harness import RESULTS, machine, read_rows, run_kdfast, table

from kdfast.sweep.summary import half_width

LOG = RESULTS / "cache_formats.jsonl"
FORMATS = {"all": [], "top10": ["--top-k", "10", "--temperature", "4"], "features": ["--kind", "features"]}
VIEWS = EPOCHS = 40


def train(options: argparse.Namespace, name: str, seed: int) -> float:
    """Return the accuracy of a student, in percent."""
    subset, cache = options.out / f"idx-{seed}.npy", options.out / f"cache-{name}-{seed}"
    student, data = options.out / f"run-{name}-{seed}", ["--data", options.data]
    run_kdfast("prune", *data, "--method", "random", "--fraction", "0.1", "--seed", seed, "--out", subset)
    views = ["--subset", subset, "--views", VIEWS, *FORMATS[name]]
    run_kdfast("cache", *data, "--teacher", options.teacher, *views, "--out", cache)
    recipe = ["--student", options.student, "--seed", seed, "--epochs", EPOCHS, "--precision", options.precision]
    run_kdfast("distill", *data, "--subset", subset, "--cache", cache, *recipe, "--out", student)
    return float(json.loads((student / "result.json").read_text())["test_top1"])


def main() -> None:
    """Run what is missing, append its rows, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--teacher", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--student", default="resnet20")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--precision", default="auto")
    options = parser.parse_args()
    rows = read_rows(LOG)
    found = {(row["student"], row["format"], row["seed"]): row["test_top1"] for row in rows}
    for seed in range(options.seeds):
        for name in FORMATS:
            key = (options.student, name, seed)
            if key not in found:
                found[key] = train(options, name, seed)
                row = {"student": options.student, "format": name, "seed": seed, "test_top1": found[key]}
                row |= {fact: machine()[fact] for fact in ("cpu", "torch", "commit")}
                with LOG.open("a") as log:
                    log.write(json.dumps(row) + "\n")
    shown = []
    for name in FORMATS:
        each, whole = (
            np.array([found[options.student, which, seed] for seed in range(options.seeds)]) for which in (name, "all")
        )
        difference = f"{(each - whole).mean():+.2f} +- {half_width(each - whole):.2f}"
        shown.append(
            {
                "format": name,
                "each seed": ", ".join(f"{value:.2f}" for value in each),
                "mean": f"{each.mean():.2f}",
                "to all": "" if name == "all" else difference,
            }
        )
    print(table(shown))


if __name__ == "__main__":
    main()
