"""Benchmark of the softmax head's gradient norms, Hessian products and influence.

    python bench/bench_influence.py speed [--rounds 11] [--threads N] [--device cuda]
    python bench/bench_influence.py planted --data cifar-10-batches-py --cache cache [--share 0.05] [--seed 0]

`speed` first checks every implementation against float64.

- `norms`: the norm of each sample's gradient, from features and weights. Baselines: opacus with materialized gradients
  (`per-sample`) and without (`ghost`), and `vmap` of torch.func.
- `hvp`: K products with the Hessian. Baselines: torch.func's `jvp(grad)` and `grad(grad . v)`, under vmap for K > 1.
  They compute the logits in each call, which kdfast receives; `kdfast + logits` includes them. `bare` is the two
  matrix products that no method avoids, over all samples at once.

Implementations run in turn; ratios are medians over rounds, with quartiles. Peak memory is the increase of the resident
set during one call in a separate process; on a GPU, of the allocated memory. CPU and GPU get the same inputs, TF32 is
off, and the targets apply to CPUs.

`planted` flips a share of the training labels, scores all samples on the teacher's cached features, and reports how
well the scores find the flipped labels (AUC): with the teacher's own head, and with a head fitted to the flipped labels
by Newton's method.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, jvp, vmap

import kdfast

sys.path.insert(0, str(Path(__file__).parent))

from harness import cuda_peak, interleave, machine, table, write_results

Call = Callable[[], Tensor]
BATCH = 1024
# Sizes (N, D, C) of norms and (N, D, C, K) of products.
NORMS = [(1024, 512, 100), (1024, 64, 10)]
PRODUCTS = [(20_000, 512, 100, 1), (4096, 512, 100, 64), (50_000, 64, 10, 1), (20_000, 64, 10, 64)]
# Minimum speedups, and maximum time relative to `bare`.
NORM_TARGETS = {(512, 100, "opacus per-sample"): 20.0, (512, 100, "vmap"): 20.0}
PRODUCT_TARGETS = {(512, 100, 1, "jvp(grad)"): 5.0, (512, 100, 64, "jvp(grad)"): 1.5}
MAX_OVERHEAD = 1.3


def make_head(n: int, d: int, c: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features, weights (C, D + 1), labels and logits, equal in each call and on each device."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    w = torch.randn(c, d + 1, generator=generator) * 2 / d**0.5
    y = torch.randint(0, c, (n,), generator=generator)
    x, w, y = (tensor.to(device) for tensor in (x, w, y))
    return x, w, y, kdfast.head_logits(x, w)


def opacus_gradients(w: Tensor) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Return opacus' two methods to compute norms of a batch; empty if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    except ImportError:
        return {}

    def layer() -> nn.Linear:
        linear = nn.Linear(w.shape[1] - 1, w.shape[0], device=w.device)
        with torch.no_grad():
            linear.weight.copy_(w[:, :-1])
            linear.bias.copy_(w[:, -1])
        return linear

    # The hook warns because the features need no gradient.
    warnings.filterwarnings("ignore", message="Full backward hook is firing")
    materialized = GradSampleModule(layer(), loss_reduction="sum")
    ghost = GradSampleModuleFastGradientClipping(layer(), loss_reduction="sum", max_grad_norm=1.0)

    def per_sample(x: Tensor, y: Tensor) -> Tensor:
        F.cross_entropy(materialized(x), y, reduction="sum").backward()
        out = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in materialized.parameters()]).norm(dim=0)
        materialized.zero_grad()
        return out

    def ghost_norms(x: Tensor, y: Tensor) -> Tensor:
        F.cross_entropy(ghost(x), y, reduction="sum").backward()
        out: Tensor = ghost.get_norm_sample()
        ghost.zero_grad()
        return out

    return {"opacus per-sample": per_sample, "opacus ghost": ghost_norms}


def norm_contenders(n: int, d: int, c: int, *, device: str) -> tuple[dict[str, Call], Tensor]:
    """Return the calls by name, and the norms of the first samples by autograd in float64."""
    x, w, y, _ = make_head(n, d, c, device)

    def loss(w: Tensor, row: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy((row @ w[:, :-1].mT + w[:, -1])[None], label[None])

    sample_gradients = vmap(grad(loss), (None, 0, 0))
    calls: dict[str, Call] = {"kdfast": lambda: kdfast.head_grad_norms(kdfast.head_logits(x, w), y, x)}
    calls |= {name: lambda f=f: f(x, y) for name, f in opacus_gradients(w).items()}  # type: ignore[misc]
    calls["vmap"] = lambda: sample_gradients(w, x, y).flatten(1).norm(dim=1)
    return calls, sample_gradients(w.double(), x[:16].double(), y[:16]).flatten(1).norm(dim=1)


def product_contenders(n: int, d: int, c: int, k: int, *, device: str) -> tuple[dict[str, Call], Tensor]:
    """Return the calls by name, and the first product by torch.func in float64.

    The head has no bias: all implementations but kdfast's would need a feature for it.
    """
    x, w, y, _ = make_head(n, d, c, device)
    w = w[:, :-1].contiguous()
    z = x @ w.mT
    v = torch.randn(k, c, d, generator=torch.Generator().manual_seed(1)).to(device)
    flat = v.flatten(0, 1)
    chunk = 16 if device == "cpu" else None  # a GPU is fastest with all vectors at once

    def forward_over_reverse(w: Tensor, x: Tensor, vector: Tensor) -> Tensor:
        return jvp(grad(lambda w: F.cross_entropy(x @ w.mT, y)), (w,), (vector,))[1]

    def reverse_over_reverse(vector: Tensor) -> Tensor:
        return grad(lambda w: (grad(lambda w: F.cross_entropy(x @ w.mT, y))(w) * vector).sum())(w)

    def over_vectors(f: Callable[[Tensor], Tensor]) -> Call:
        return (lambda: f(v[0])[None]) if k == 1 else (lambda: vmap(f, chunk_size=chunk)(v))

    calls: dict[str, Call] = {
        "kdfast": lambda: kdfast.head_hvp(x, z, v, bias=False),
        "kdfast + logits": lambda: kdfast.head_hvp(x, x @ w.mT, v, bias=False),
        "jvp(grad)": over_vectors(lambda vector: forward_over_reverse(w, x, vector)),
        "grad(grad . v)": over_vectors(reverse_over_reverse),
        "bare": lambda: (x @ flat.mT).mT @ x,
    }
    return calls, forward_over_reverse(w.double(), x.double(), v[0].double())


def measure(name: str, sizes: tuple[int, ...], rounds: int, device: str) -> list[dict[str, Any]]:
    """Check and time every implementation; return a row of the table for each."""
    norms = name == "norms"
    calls, truth = (norm_contenders if norms else product_contenders)(*sizes, device=device)
    for who, call in calls.items():
        result = call()[: len(truth)] if norms else call()[0]
        error = float((result.double() - truth).norm() / truth.norm())
        if who != "bare" and not error < 1e-4:
            raise AssertionError(f"{who} is wrong: relative error {error:.1e}")
    timings = interleave(calls, rounds, device=device)
    rows = []
    for who, timing in timings.items():
        ratio = timings["kdfast"].ratio_to(timing)
        rows.append(
            {
                "what": name,
                **dict(zip(("N", "D", "C", "K"), (*sizes, "")[:4], strict=True)),
                "who": who,
                "ms": f"{timing.median * 1e3:.{2 if device == 'cpu' else 3}f}",
                "kdfast is faster": "" if who == "kdfast" else f"{ratio[0]:.2f}x ({ratio[1]:.2f}-{ratio[2]:.2f})",
                "bar": verdict(name, sizes, who, ratio[0]) if device == "cpu" else "",
                "peak MB": f"{peak(name, sizes, who, calls[who], device):.0f}",
            }
        )
    return rows


def verdict(name: str, sizes: tuple[int, ...], who: str, ratio: float) -> str:
    """Return the target of a row and whether it is met; empty if it has none."""
    if who == "bare" and sizes[1:3] == (512, 100):
        return f">= {1 / MAX_OVERHEAD:.2f}x {'met' if ratio >= 1 / MAX_OVERHEAD else 'MISSED'}"
    targets: dict[tuple[Any, ...], float] = dict(NORM_TARGETS if name == "norms" else PRODUCT_TARGETS)  # type: ignore[arg-type]
    target = targets.get((*sizes[1:], who))
    return "" if target is None else f">= {target:g}x {'met' if ratio >= target else 'MISSED'}"


PEAK = """
import sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {folder!r})
import bench_influence as b
make = b.norm_contenders if {name!r} == "norms" else b.product_contenders
make(8, *{sizes!r}[1:], device="cpu")[0][{who!r}]()
call = make(*{sizes!r}, device="cpu")[0][{who!r}]
read = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) / 1024
open("/proc/self/clear_refs", "w").write("5")
before = read("VmRSS")
call()
print(read("VmHWM") - before)
"""


def peak(name: str, sizes: tuple[int, ...], who: str, call: Call, device: str) -> float:
    """Return the increase in memory use (MB) during one call; NaN if the system does not report it."""
    if device == "cuda":
        return cuda_peak(call) / 2**20
    if not sys.platform.startswith("linux"):
        return float("nan")
    code = PEAK.format(folder=str(Path(__file__).parent), name=name, sizes=sizes, who=who)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def speed(options: argparse.Namespace) -> None:
    """Measure everything, print the table and write bench/results/influence*.json."""
    topic = "influence" if options.device == "cpu" else "influence_cuda"
    rows: list[dict[str, Any]] = []
    for name, grid in (("norms", NORMS), ("hvp", PRODUCTS)):
        for sizes in grid:
            first = len(rows)
            rows += measure(name, sizes, options.rounds, options.device)
            print(table(rows[first:]), flush=True)
            # Written after each size, so that an interrupted run keeps its results.
            path = write_results(topic, rows, rounds=options.rounds)
    print(f"\n{table(rows)}\n{machine()}\n{path}")


def planted(options: argparse.Namespace) -> None:
    """Measure how well scores find flipped labels; print the table and write bench/results/influence_planted*.json."""
    from kdfast.data.readers.registry import open_source
    from kdfast.data.readers.relabel import flip_labels
    from kdfast.teacher.cache import TeacherCache

    source = open_source(options.data)
    cache = TeacherCache.open(options.cache)
    labels = source.train.labels
    noisy = flip_labels(labels, options.share, options.seed, len(source.classes))
    arrays = (cache.features(), cache.identity_logits(), noisy)
    x, z, y = (torch.from_numpy(np.array(a)).to(options.device) for a in arrays)
    flipped = noisy != labels
    rows = []
    for head_name in ("teacher's", "refitted"):
        fit = 0.0
        if head_name == "refitted":
            w, fit = timed(lambda: kdfast.head_newton(x, y, l2=options.l2), options.device)
            z = kdfast.head_logits(x, w).float()
        rows += score_rows(head_name, x, z, y, flipped, options.l2, fit)
    rows += against_opacus(x, y, options)
    print(f"{table(rows)}\n{machine()}")
    settings = {"share": options.share, "seed": options.seed, "l2": options.l2, "fingerprint": source.fingerprint}
    topic = "influence_planted" if options.device == "cpu" else "influence_planted_cuda"
    print(write_results(topic, rows, **settings))


def timed(call: Call, device: str) -> tuple[Tensor, float]:
    """Return the result of a call and its seconds; on a GPU those of a second call, since the first loads libraries."""
    if device == "cuda":
        call()
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


def score_rows(name: str, x: Tensor, z: Tensor, y: Tensor, flipped: Any, l2: float, fit: float) -> list[dict[str, Any]]:
    """Return a row with AUC and seconds for each score of one head."""
    from sklearn.metrics import roc_auc_score

    scores: dict[str, Call] = {
        "gradient norm": lambda: kdfast.head_grad_norms(z, y, x),
        "self-influence": lambda: kdfast.head_self_influence(x, z, y, l2=l2),
    }
    cpu = x.device.type == "cpu"
    rows = []
    for score, call in scores.items():
        values, seconds = timed(call, x.device.type)
        rows.append(
            {
                "head": name,
                "score": score,
                "samples": len(y),
                "AUC": f"{roc_auc_score(flipped, values.cpu().numpy()):.4f}",
                "bar": ">= 0.95" if cpu else "",
                "seconds": f"{seconds:.{3 if cpu else 5}f}",
                "limit": "< 10" if cpu else "",
                "fit seconds": f"{fit:.2f}",
                "kdfast is faster": "",
            }
        )
    return rows


def against_opacus(x: Tensor, y: Tensor, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Time gradient norms against opacus in batches of `BATCH`; all implementations compute the logits."""
    w = kdfast.head_newton(x, y, l2=options.l2).float()
    calls: dict[str, Call] = {"kdfast": lambda: kdfast.head_grad_norms(kdfast.head_logits(x, w), y, x)}
    for name, f in opacus_gradients(w).items():
        calls[name] = lambda f=f: torch.cat(  # type: ignore[misc]
            [f(*batch) for batch in zip(x.split(BATCH), y.split(BATCH), strict=True)]
        )
    truth = calls["kdfast"]()
    for name, call in calls.items():
        if not torch.allclose(call(), truth, rtol=1e-3, atol=1e-5 * float(truth.max())):
            raise AssertionError(f"{name} disagrees with kdfast")
    timings = interleave(calls, options.rounds, device=options.device)
    rows = []
    for name, timing in timings.items():
        ratio = timings["kdfast"].ratio_to(timing)
        faster = "" if name == "kdfast" else f"{ratio[0]:.1f}x ({ratio[1]:.1f}-{ratio[2]:.1f})"
        rows.append(
            {
                "head": "refitted",
                "score": f"gradient norm by {name}",
                "samples": len(y),
                "seconds": f"{timing.median:.{3 if options.device == 'cpu' else 5}f}",
                "kdfast is faster": faster,
            }
        )
    return rows


def main() -> None:
    """Run the part named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "planted"], nargs="?", default="speed")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--data", help="planted: data with labels, such as cifar-10-batches-py")
    parser.add_argument("--cache", help="planted: the teacher's cache of the data")
    parser.add_argument("--share", type=float, default=0.05, help="planted: share of labels to flip")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--l2", type=float, default=1e-4, help="planted: weight of the head's penalty")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False  # some containers enable it
    if options.part == "planted" and not (options.data and options.cache):
        parser.error("planted needs --data and --cache")
    (planted if options.part == "planted" else speed)(options)


if __name__ == "__main__":
    main()
