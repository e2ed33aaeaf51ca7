"""Cost of IF-Beta: scores and search for 50,000 samples, relative to one distillation on the same machine.

    python bench/bench_if_beta.py [--samples 50000] [--dim 64] [--classes 10 100] [--fraction 0.1]
                                  [--device cuda]

The data are Gaussian classes with a noisy teacher; the cost depends only on the sizes. Targets: under 10 minutes on 2
cores, and under 1% of distilling a ResNet-32 for 240 epochs, whose time is estimated from a few steps in the same
process.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from harness import table, write_results

from kdfast.prune.if_beta import IFBeta
from kdfast.prune.if_beta.selector.costs import distillation_seconds


def make_data(samples: int, dim: int, classes: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Return logits, features and labels of Gaussian classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(samples, dtype=np.int64) % classes
    means = rng.normal(size=(classes, dim))
    features = means[labels] + rng.normal(size=(samples, dim))
    logits = features @ means.T - (means**2).sum(1) / 2
    return torch.tensor(logits).float(), torch.tensor(features).float(), labels


def measure(method: IFBeta, samples: int, dim: int, classes: int, fraction: float, device: str) -> dict[str, Any]:
    """Return one row of the table: the seconds of scores and search, and those of one distillation."""
    data = make_data(samples, dim, classes)
    found = method.fit(*data, fraction, device=device)
    assert len(found.ids) == round(fraction * samples)
    distillation = distillation_seconds(samples, classes, (32, 32), device)
    return {
        "classes": classes,
        "samples": samples,
        "score_seconds": found.score_seconds,
        "search_seconds": found.search_seconds,
        "steps": len(found.rewards),
        "proxies": found.trials,
        "distillation_seconds": distillation,
        "percent": 100 * found.seconds / distillation,
        "under_ten_minutes": found.seconds < 600,
        "under_one_percent": found.seconds < 0.01 * distillation,
    }


def main() -> None:
    """Measure, print a table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--classes", type=int, nargs="+", default=[10, 100])
    parser.add_argument("--fraction", type=float, default=0.1)
    options = parser.parse_args()
    topic = "if_beta" if options.device == "cpu" else "if_beta_cuda"
    rows = []
    for classes in options.classes:
        rows.append(measure(IFBeta(), options.samples, options.dim, classes, options.fraction, options.device))
        write_results(topic, rows)
    print(table(rows))


if __name__ == "__main__":
    main()
