"""What precedes a student: images per second while a cache is built, and the cost of IF-Beta."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import bench_if_beta
import numpy as np

from gpu.data import VIEWS, TrainingData, training_data
from gpu.results import PartResults, measure_missing
from kdfast.data.readers.registry import open_source
from kdfast.nets.checkpoint import load_model
from kdfast.pruning.if_beta import IFBeta
from kdfast.pruning.if_beta.proxy import ProxyTrainingConfig
from kdfast.pruning.if_beta.search import Schedule
from kdfast.teacher.build import build_cache

_CACHED = {"cuda": 1000, "cpu": 20}  # samples
_IF_BETA = {"cuda": [(50_000, 64, 100), (50_000, 64, 10)], "cpu": [(400, 8, 4)]}  # samples, features, classes
_METHOD = {"cuda": IFBeta(), "cpu": IFBeta(budget=ProxyTrainingConfig(steps=2), schedule=Schedule(steps=1))}
_FRACTION = 0.1


def cache_rate(data: TrainingData, precision: str, device: str) -> dict[str, Any]:
    """Build a cache of a few samples twice, and return the rate of the second build, which compiles nothing."""
    source, model = open_source(data.data), load_model(data.teacher)
    out = Path(os.environ["QUEUE_WORK"]) / "timed-cache"
    views = VIEWS[device] or source.view_spec.count
    for _ in range(2):
        shutil.rmtree(out, ignore_errors=True)
        ids = np.arange(_CACHED[device])
        build = build_cache(source, model, out, ids=ids, n_views=views, device=device, precision=precision)
    shutil.rmtree(out)
    images = _CACHED[device] * views
    facts = {"teacher": model.name, "data": data.name, "images": images, "seconds": build.seconds}
    return {**facts, "images_per_second": images / build.seconds}


def if_beta_cases(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the measurements of scores and search by key."""
    return {
        f"IF-Beta N={samples} D={dim} C={classes}": partial(
            bench_if_beta.measure, _METHOD[device], samples, dim, classes, _FRACTION, device
        )
        for samples, dim, classes in _IF_BETA[device]
    }


def main() -> None:
    """Measure the cases without a row."""
    results = PartResults.from_environment()
    device, data = results.device, training_data(results.device)
    caches = {f"cache {kind}": partial(cache_rate, data, kind, device) for kind in ("float32", "bfloat16")}
    measure_missing(results, caches | if_beta_cases(device))


if __name__ == "__main__":
    main()
