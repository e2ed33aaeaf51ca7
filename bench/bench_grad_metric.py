"""Functions of the elements of per-sample gradients: kdfast compared with torch.func.

    python bench/bench_grad_metric.py [--rounds 7] [--threads N] [--nets resnet18 depthwise] [--device cuda]

Times norms in a diagonal metric, with forward and backward pass, beside the same norms by torch.func (vmap over grad)
and beside kdfast's norms without a metric; also the Fisher diagonal and dot products with a vector. Networks, batches,
timing and memory are those of `bench_grad_norms.py`. Each call is checked against float64 autograd before it is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from bench_grad_norms import NETS, build, peak, vmapped
from harness import interleave, machine, table, write_results
from torch import Tensor, nn

import kdfast

# Minimum speedups of the norms in a metric on a CPU, by network and baseline.
BARS = {("resnet18", "vmap"): 3.0, ("resnet18", "without a metric"): 1 / 2.5}


def metric_of(model: nn.Module) -> dict[str, Tensor]:
    """Return a metric, equal for every call and device."""
    random = torch.Generator().manual_seed(1)
    return {name: (torch.rand(p.shape, generator=random) + 0.1).to(p.device) for name, p in model.named_parameters()}


def contenders(name: str, device: str) -> dict[str, Callable[[], Any]]:
    """Return the calls by name; the norms in a metric come first."""
    model, x, y = build(name, device)
    metric = metric_of(model)
    return {
        "metric": lambda: kdfast.grad_norms(model, x, y, metric=metric),
        "without a metric": lambda: kdfast.grad_norms(model, x, y),
        "fisher_diagonal": lambda: kdfast.fisher_diagonal(model, [(x, y)]),
        "grad_dots": lambda: kdfast.grad_dots(model, x, y, metric),
        "vmap": vmapped(*build(name, device), metric),
    }


def truth(name: str) -> dict[str, Any]:
    """Compute what the `contenders` return by float64 autograd on the CPU, one sample at a time."""
    model, x, y = build(name, "cpu")
    metric = {name: f.double() for name, f in metric_of(model).items()}
    model.double()
    fisher = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    squares, weighted, dots = torch.zeros(3, len(x), dtype=torch.float64)
    for i in range(len(x)):
        loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        for (key, f), g in zip(metric.items(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            fisher[key] += g.square()
            squares[i] += g.square().sum()
            weighted[i] += (g.square() / f).sum()
            dots[i] += (g * f).sum()
    norms = {"metric": weighted.sqrt(), "vmap": weighted.sqrt(), "without a metric": squares.sqrt()}
    return {**norms, "grad_dots": dots, "fisher_diagonal": fisher}


def error_of(found: Any, expected: Any) -> float:
    """Return the largest error relative to the value, for dots to their mean size, for a Fisher diagonal per tensor."""
    if isinstance(expected, dict):
        return max(float((found[name].cpu() - x).abs().max() / x.max()) for name, x in expected.items())
    size = expected if bool((expected > 0).all()) else expected.abs().mean()
    return float(((found.cpu() - expected).abs() / size).max())


def check(calls: dict[str, Callable[[], Any]], expected: dict[str, Any], device: str) -> dict[str, float]:
    """Return the errors; raise if one of kdfast exceeds float32 rounding over many layers."""
    errors = {name: error_of(call(), expected[name]) for name, call in calls.items()}
    limit = 1e-5 if device == "cpu" else 1e-4  # cuDNN may select less accurate algorithms, such as Winograd's
    for name, error in errors.items():
        if not error < (1e-3 if name in ("vmap", "grad_dots") else limit):  # dots of many terms nearly cancel
            raise AssertionError(f"{name} is wrong: error {error:.1e}")
    return errors


def measure(name: str, rounds: int, device: str) -> list[dict[str, Any]]:
    """Return one table row per call."""
    calls = contenders(name, device)
    errors = check(calls, truth(name), device)
    timings = interleave(calls, rounds, device=device)
    rows = []
    for what, timing in timings.items():
        ratio = timings["metric"].ratio_to(timing)
        bar = BARS.get((name, what)) if device == "cpu" else None
        rows.append(
            {
                "net": name,
                "N": NETS[name][2],
                "what": what,
                "ms": f"{timing.median * 1e3:.1f}",
                "samples/s": f"{NETS[name][2] / timing.median:.1f}",
                "relative to metric": "" if what == "metric" else f"{ratio[0]:.2f}x ({ratio[1]:.2f}-{ratio[2]:.2f})",
                "bar": "" if bar is None else f">= {bar:g}x {'met' if ratio[0] >= bar else 'MISSED'}",
                "error": f"{errors[what]:.0e}",
                "peak MB": peak(name, what, calls[what], device, "bench_grad_metric"),
            }
        )
    return rows


def main() -> None:
    """Print the table and write bench/results/grad_metric*.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--nets", nargs="*", default=["resnet18", "depthwise"], choices=list(NETS))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":  # on by default for convolutions, in some containers also for matrix products
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    rows: list[dict[str, Any]] = []
    for name in options.nets:
        rows += measure(name, options.rounds, options.device)
    path = write_results("grad_metric" if options.device == "cpu" else "grad_metric_cuda", rows, rounds=options.rounds)
    print(f"{table(rows)}\n{machine()}\n{path}")


if __name__ == "__main__":
    main()
