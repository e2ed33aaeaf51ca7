"""Gradient norms of whole networks and softmax heads, N >= 128, against opacus, torch.func and PyTorch's products."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import bench_grad_metric
import bench_grad_norms
import bench_influence
import torch
from harness import Timing, cuda_peak, interleave

from gpu.results import PartResults, measure_missing

# Network, samples in a batch, side of the images.
_NETWORKS = {
    "cuda": [("resnet18", 128, 32), ("resnet18", 512, 32), ("depthwise", 128, 32), ("resnet18-imagenet", 128, 224)],
    "cpu": [("depthwise", 2, 8)],
}
_METRIC_NETWORKS = {"cuda": [("resnet18", 128, 32), ("depthwise", 128, 32)], "cpu": [("depthwise", 2, 8)]}
# N, D, C, and K of products.
_NORMS: dict[str, list[tuple[int, ...]]] = {
    "cuda": [(1024, 512, 100), (50_000, 512, 100), (50_000, 64, 10)],
    "cpu": [(64, 16, 5)],
}
_PRODUCTS: dict[str, list[tuple[int, ...]]] = {
    "cuda": [(50_000, 512, 100, 1), (50_000, 512, 100, 64), (50_000, 64, 10, 1), (50_000, 64, 10, 64)],
    "cpu": [(64, 16, 5, 2)],
}
_ROUNDS = {"cuda": 7, "cpu": 1}


def row(
    timings: dict[str, Timing], calls: dict[str, Callable[[], Any]], device: str, ours: str = "kdfast"
) -> dict[str, Any]:
    """Return the times, the speedups of our call, and the peak memory."""
    return {
        "ms": {name: timing.median * 1e3 for name, timing in timings.items()},
        f"{ours}_is_faster": {name: timings[ours].ratio_to(timing) for name, timing in timings.items()},
        "peak_mb": {name: cuda_peak(call) / 2**20 for name, call in calls.items()} if device == "cuda" else {},
    }


def network(name: str, n: int, side: int, device: str) -> dict[str, Any]:
    """Time a whole network on n samples."""
    bench_grad_norms.NETS[name] = (bench_grad_norms.NETS[name][0], side, n)
    calls = bench_grad_norms.contenders(name, device)
    errors = bench_grad_norms.check(calls, bench_grad_norms.truth(name), device)
    return {"n": n, "errors": errors, **row(interleave(calls, _ROUNDS[device], device=device), calls, device)}


def metric(name: str, n: int, side: int, device: str) -> dict[str, Any]:
    """Time norms in a metric, beside norms without one, the Fisher diagonal and dot products, on n samples."""
    bench_grad_norms.NETS[name] = (bench_grad_norms.NETS[name][0], side, n)
    calls = bench_grad_metric.contenders(name, device)
    errors = bench_grad_metric.check(calls, bench_grad_metric.truth(name), device)
    return {"n": n, "errors": errors, **row(interleave(calls, _ROUNDS[device], device=device), calls, device, "metric")}


def head(name: str, sizes: tuple[int, ...], device: str) -> dict[str, Any]:
    """Time norms or products of a softmax head."""
    norms = name == "norms"
    make = bench_influence.norm_contenders if norms else bench_influence.product_contenders
    calls, truth = make(*sizes, device=device)
    errors = {}
    for who, call in calls.items():
        result = call()[: len(truth)] if norms else call()[0]
        errors[who] = float((result.double() - truth).norm() / truth.norm())
        if who != "bare" and not errors[who] < 1e-4:
            raise AssertionError(f"{who} is wrong: relative error {errors[who]:.1e}")
    return {"errors": errors, **row(interleave(calls, _ROUNDS[device], device=device), calls, device)}


def cases(device: str) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the measurements by key."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name, grid in (("norms", _NORMS), ("products", _PRODUCTS)):
        for sizes in grid[device]:
            shape = " ".join(f"{letter}={size}" for letter, size in zip("NDCK", sizes, strict=False))
            found[f"head {name} {shape}"] = partial(head, name, sizes, device)
    for name, n, side in _NETWORKS[device]:
        found[f"network {name} N={n}"] = partial(network, name, n, side, device)
    for name, n, side in _METRIC_NETWORKS[device]:
        found[f"metric {name} N={n}"] = partial(metric, name, n, side, device)
    return found


def main() -> None:
    """Measure the cases without a row."""
    results = PartResults.from_environment()
    # On by default for convolutions, in some installations also for matrix products.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    measure_missing(results, cases(results.device))


if __name__ == "__main__":
    main()
