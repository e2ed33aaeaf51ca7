"""`kd_loss` against plain PyTorch and torch.compile: forward and backward, with teacher rows picked by index.

    python bench/bench_kd_loss.py [--rounds 21] [--threads N] [--classes 100 1000] [--teacher float16]
    pytest bench/bench_kd_loss.py --benchmark-only

The loss and the gradient of each implementation are checked against float64 before it is timed. Implementations run in
turn; a ratio is the median over the rounds, with quartiles. `of copy` compares the minimal memory traffic (read student
and teacher once, write the gradient once) with the bandwidth of copying a tensor, measured in the same run. Extra
memory is the peak above the inputs during forward and backward, in units of the gradient. The second table compares
teacher rows picked by index in random order with the same rows in order (`rows=None`), and random rows of a large
teacher with a pass through it in order.
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kdfast

sys.path.insert(0, str(Path(__file__).parent))

from harness import copy_bandwidth, cuda_peak, interleave, machine, table, write_results

ALPHA, TEMPERATURE = 0.5, 4.0
CPU_GRID = {10: 128, 100: 128, 1000: 1024, 32000: 256, 131072: 64, 262144: 32}
GPU_GRID = {10: 4096, 100: 4096, 1000: 16384, 32000: 8192, 131072: 4096, 262144: 2048}
LARGE = 1000  # fewest classes for which gathers are measured; below, the cost of a call dominates
Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
# Smallest acceptable ratios, by number of classes and baseline.
TARGETS = {
    (100, "compile"): 5.0,
    (1000, "compile"): 4.0,
    (1000, "eager"): 7.0,
    (32000, "compile"): 4.0,
    (32000, "eager"): 10.0,
}


def eager(logits: Tensor, labels: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    """The loss in plain PyTorch, in float32 like kdfast's."""
    z, t = logits.float(), teacher[rows].float()
    kl = F.kl_div(
        F.log_softmax(z / TEMPERATURE, 1), F.log_softmax(t / TEMPERATURE, 1), log_target=True, reduction="batchmean"
    )
    return (1 - ALPHA) * F.cross_entropy(z, labels) + ALPHA * TEMPERATURE**2 * kl


def ours(logits: Tensor, labels: Tensor, teacher: Tensor, rows: Tensor | None) -> Tensor:
    """The public function."""
    return kdfast.kd_loss(logits, labels, teacher, rows, alpha=ALPHA, temperature=TEMPERATURE)


def liger() -> Loss | None:
    """Liger-Kernel's cross-entropy plus its KL divergence, if installed; its fused loss needs the last layer."""
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss, LigerKLDIVLoss
    except ImportError:
        return None
    cross_entropy, divergence = LigerCrossEntropyLoss(), LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(logits: Tensor, labels: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
        z, t = logits.float() / TEMPERATURE, teacher[rows].float() / TEMPERATURE
        kl = divergence(F.log_softmax(z, 1), F.log_softmax(t, 1))
        return (1 - ALPHA) * cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * kl

    return loss


def contenders(device: str) -> dict[str, Loss]:
    """Return losses by name; the first is kdfast's, and "kdfast compiled" is the same under torch.compile."""
    torch._dynamo.reset()
    found: dict[str, Loss] = {
        "kdfast": ours,
        "compile": torch.compile(eager, dynamic=False),
        "eager": eager,
        "kdfast compiled": torch.compile(ours, dynamic=False, fullgraph=True),
    }
    if device == "cuda" and (other := liger()) is not None:
        found["liger"] = other
    return found


def inputs(n: int, c: int, dtype: torch.dtype, teacher: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """Return student logits, labels, a teacher with up to 50,000 rows in 256 MB (but at least N), and random rows."""
    m = max(n, min(50_000, 2**28 // (c * teacher.itemsize)))
    generator = torch.Generator().manual_seed(0)
    bank = torch.randn(min(m, 1024), c, generator=generator).mul_(3).to(teacher)
    bank = bank.repeat(-(-m // bank.shape[0]), 1)[:m].to(device)
    z = torch.randn(n, c, generator=generator).mul_(3).to(device, dtype).requires_grad_()
    labels, rows = (torch.randint(0, high, (n,), generator=generator).to(device) for high in (c, m))
    return z, labels, bank, rows


def step(loss: Callable[..., Tensor], args: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    """Forward and backward."""
    value = loss(*args)
    return value, torch.autograd.grad(value, args[0])[0]


def check(losses: dict[str, Loss], args: tuple[Tensor, ...]) -> dict[str, float]:
    """Return each gradient's relative error against float64 on a few rows; raise if it exceeds rounding."""
    z, labels, teacher, rows = args
    few = tuple(x[:8].detach() for x in (z, labels, rows))
    exact = few[0].double().requires_grad_()
    _, truth = step(eager_double, (exact, few[1], teacher, few[2]))
    errors = {}
    for name, loss in losses.items():
        _, grad = step(loss, (few[0].clone().requires_grad_(), few[1], teacher, few[2]))
        errors[name] = ((grad.double() - truth).abs().max() / truth.abs().max()).item()
        if not errors[name] < 4 * torch.finfo(z.dtype).eps + 1e-5:
            raise AssertionError(f"{name} is wrong: relative error {errors[name]:.1e} of the gradient")
    return errors


def eager_double(logits: Tensor, labels: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    """The reference in float64."""
    return kdfast.kd_loss(logits, labels, teacher, rows, alpha=ALPHA, temperature=TEMPERATURE, backend="reference")


PEAK = """
import sys, torch
sys.path.insert(0, {folder!r})
import bench_kd_loss as b
from kdfast.ops.kd_loss import gradient_buffer
args = b.inputs({n}, {c}, torch.{dtype}, torch.{teacher}, "cpu")
loss = b.contenders("cpu")[{name!r}]
b.step(loss, args)
gradient_buffer.release()
open("/proc/self/clear_refs", "w").write("5")
read = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before = read("VmRSS")
out = b.step(loss, args)
print((read("VmHWM") - before) / (args[0].numel() * args[0].itemsize))
"""


def extra_memory(name: str, loss: Loss, args: tuple[Tensor, ...], sizes: dict[str, Any], device: str) -> float | None:
    """Return the peak above the inputs in units of the gradient; None if too small to distinguish from noise."""
    gradient = args[0].numel() * args[0].itemsize
    if device == "cuda":
        return cuda_peak(lambda: step(loss, args)) / gradient
    if gradient < 2**24 or not sys.platform.startswith("linux"):
        return None
    code = PEAK.format(folder=str(Path(__file__).parent), name=name, **sizes)
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


GATHER_TARGET = 1.02  # largest acceptable ratio


def batches(order: Tensor, n: int) -> Iterator[Tensor]:
    """Yield N rows at a time of an order of the teacher's rows, in an endless cycle."""
    return itertools.cycle(order[: len(order) // n * n].split(n))


def gather_cost(n: int, c: int, dtype: torch.dtype, teacher: torch.dtype, rounds: int, device: str) -> dict[str, Any]:
    """Measure what picking rows by index costs: among a batch's own rows, and from all over a large teacher."""
    z, labels, bank, _ = inputs(n, c, dtype, teacher, device)
    generator = torch.Generator().manual_seed(1)
    order, whole = (torch.randperm(m, generator=generator).to(device) for m in (n, len(bank)))
    through, all_over = batches(torch.arange(len(bank), device=device), n), batches(whole, n)
    contenders = {
        "order": lambda: step(ours, (z, labels, bank[:n], None)),
        "index": lambda: step(ours, (z, labels, bank[:n], order)),
        "through": lambda: step(ours, (z, labels, bank, next(through))),
        "all over": lambda: step(ours, (z, labels, bank, next(all_over))),
    }
    timings = interleave(contenders, rounds, device=device)
    near, far = timings["order"].ratio_to(timings["index"]), timings["through"].ratio_to(timings["all over"])
    return {
        "C": c,
        "N": n,
        "in order, ms": f"{timings['order'].median * 1e3:.3f}",
        "by index, ms": f"{timings['index'].median * 1e3:.3f}",
        "by index / in order": f"{near[0]:.3f}x ({near[1]:.3f}-{near[2]:.3f})",
        "target": f"<= {GATHER_TARGET:g}x {'met' if near[0] <= GATHER_TARGET else 'MISSED'}",
        "teacher, MB": f"{bank.numel() * bank.element_size() / 1e6:.0f}",
        "through it, ms": f"{timings['through'].median * 1e3:.3f}",
        "all over it / through it": f"{far[0]:.3f}x ({far[1]:.3f}-{far[2]:.3f})",
    }


def measure(
    n: int, c: int, dtype: torch.dtype, teacher: torch.dtype, rounds: int, device: str, copy: float
) -> list[Any]:
    """Return one row of the table for each implementation."""
    args, losses = inputs(n, c, dtype, teacher, device), contenders(device)
    errors = check(losses, args)
    timings = interleave({name: lambda f=f: step(f, args) for name, f in losses.items()}, rounds, device=device)
    traffic = n * c * (2 * dtype.itemsize + teacher.itemsize)
    sizes = {"n": n, "c": c, "dtype": str(dtype)[6:], "teacher": str(teacher)[6:]}
    rows = []
    for name, timing in timings.items():
        ratio = timings["kdfast"].ratio_to(timing)
        memory = extra_memory(name, losses[name], args, sizes, device)
        goal = TARGETS.get((c, name)) if device == "cpu" else None
        rows.append(
            {
                "C": c,
                "N": n,
                "student": sizes["dtype"],
                "teacher": sizes["teacher"],
                "what": name,
                "ms": f"{timing.median * 1e3:.3f}",
                "kdfast is faster": "" if name == "kdfast" else f"{ratio[0]:.2f}x ({ratio[1]:.2f}-{ratio[2]:.2f})",
                "target": "" if goal is None else f">= {goal:g}x {'met' if ratio[0] >= goal else 'MISSED'}",
                "GB/s": f"{traffic / timing.median / 1e9:.2f}",
                "of copy": f"{traffic / timing.median / copy:.0%}",
                "gradient error": f"{errors[name]:.0e}",
                "extra memory": "" if memory is None else f"{memory:.2f}",
            }
        )
    return rows


def main() -> None:
    """Print the table and write bench/results/kd_loss*.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--classes", type=int, nargs="*", default=None)
    parser.add_argument("--dtype", default=None, help="of the student: float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--teacher", default="float16")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    grid = GPU_GRID if cuda else CPU_GRID
    dtype, teacher = (
        getattr(torch, x) for x in (options.dtype or ("bfloat16" if cuda else "float32"), options.teacher)
    )
    copy = copy_bandwidth(device=options.device)
    topic = "kd_loss_cuda" if cuda else "kd_loss"
    rows: list[Any] = []
    gathers: list[Any] = []
    for c in options.classes or grid:
        shape = (grid.get(c, 128), c, dtype, teacher, options.rounds, options.device)
        first = len(rows)
        rows += measure(*shape, copy)
        print(table(rows[first:]), flush=True)
        if c >= LARGE:
            gathers.append(gather_cost(*shape))
        # Written after each size, so that an interrupted run leaves its rows.
        path = write_results(topic, rows, gather=gathers, copy_bytes_per_second=copy, rounds=options.rounds)
    tables = "\n\n".join(table(part) for part in (rows, gathers) if part)
    print(f"\n{tables}\ncopy: {copy / 1e9:.1f} GB/s read plus written\n{machine()}\n{path}")


@pytest.mark.parametrize("name", ["kdfast", "compile", "eager"])
@pytest.mark.parametrize("c", [100, 1000])
def test_forward_and_backward(benchmark, c, name):
    benchmark.group = f"kd_loss: {CPU_GRID[c]} rows of {c} classes, forward and backward"
    args, losses = inputs(CPU_GRID[c], c, torch.float32, torch.float16, "cpu"), contenders("cpu")
    benchmark.extra_info["gradient error"] = check({name: losses[name]}, args)[name]
    benchmark(step, losses[name], args)


if __name__ == "__main__":
    main()
