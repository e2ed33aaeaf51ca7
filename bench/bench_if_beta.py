"""Cost of IF-Beta: scores and search for 50,000 samples, relative to one distillation on the same machine.

    python bench/bench_if_beta.py [--samples 50000] [--dim 64] [--classes 10 100] [--fraction 0.1]

The data are Gaussian classes with a noisy teacher; the cost depends only on the sizes. Targets: under 10 minutes on 2
cores, and under 1% of distilling a ResNet-32 for 240 epochs, whose time is estimated from a few steps in the same
process.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from harness import table, write_results

from kdfast.prune.if_beta import IFBeta
from kdfast.prune.if_beta.command import distillation_seconds


def make_data(samples: int, dim: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return logits, features and labels of Gaussian classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(samples, dtype=np.int64) % classes
    means = rng.normal(size=(classes, dim))
    features = means[labels] + rng.normal(size=(samples, dim))
    logits = features @ means.T - (means**2).sum(1) / 2
    return torch.tensor(logits).float(), torch.tensor(features).float(), labels


def main() -> None:
    """Measure, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--fraction", type=float, default=0.1)
    options = parser.parse_args()
    rows = []
    for classes in options.classes:
        data = make_data(options.samples, options.dim, classes)
        found = IFBeta().fit(*data, options.fraction)
        assert len(found.ids) == round(options.fraction * options.samples)
        distillation = distillation_seconds(options.samples, classes, (32, 32))
        rows.append(
            {
                "classes": classes,
                "samples": options.samples,
                "score_seconds": found.score_seconds,
                "search_seconds": found.search_seconds,
                "steps": len(found.rewards),
                "proxies": found.trials,
                "distillation_seconds": distillation,
                "percent": 100 * found.seconds / distillation,
                "under_ten_minutes": found.seconds < 600,
                "under_one_percent": found.seconds < 0.01 * distillation,
            }
        )
    print(table(rows))
    write_results("if_beta", rows)


if __name__ == "__main__":
    main()
