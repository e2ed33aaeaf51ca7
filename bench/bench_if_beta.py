"""Cost of IF-Beta: scores and search for 50,000 samples, relative to one distillation on the same machine.

    python bench/bench_if_beta.py [--samples 50000] [--dim 64] [--classes 10 100] [--fraction 0.1]
                                  [--presets kdfast paper] [--device cuda]

The data are Gaussian classes with a noisy teacher; the cost depends only on the sizes. Targets: under 10 minutes on 2
cores, and under 1% of distilling a ResNet-32 for 240 epochs, whose time is estimated from a few steps in the same
process. The preset paper ranks by random numbers here: its score, influence-fvm of a flattened network, costs some
epochs of the teacher, which idx.json records.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from harness import table, write_results

from kdfast.pruning.if_beta import SAMPLE_SCORES, IFBeta
from kdfast.pruning.if_beta.selector.costs import distillation_seconds
from kdfast.pruning.if_beta.selector.presets import DEFAULT_PRESET, OPTIONS, build_learner
from kdfast.pruning.if_beta.selector.select import IF_BETA


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
    scores = None if method.score in SAMPLE_SCORES else np.random.default_rng(1).random(samples)
    found = method.fit(*data, fraction, scores=scores, device=device)
    assert len(found.ids) == round(fraction * samples)
    distillation = distillation_seconds(samples, classes, (32, 32), device)
    return {
        "classes": classes,
        "samples": samples,
        "fraction": fraction,
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
    parser.add_argument("--presets", choices=list(OPTIONS), nargs="+", default=list(OPTIONS))
    options = parser.parse_args()
    for preset in options.presets:
        method = build_learner(IF_BETA.complete_options("if-beta", {"preset": preset}), "balanced")
        topic = "if_beta" + ("" if preset == DEFAULT_PRESET else f"_{preset}") + "_cuda" * (options.device == "cuda")
        rows = []
        for classes in options.classes:
            rows.append(measure(method, options.samples, options.dim, classes, options.fraction, options.device))
            write_results(topic, rows)
        print(f"preset {preset}\n{table(rows)}")


if __name__ == "__main__":
    main()
