"""`kd_loss` with other divergences than KL against their textbook forms under torch.compile and in plain PyTorch.

    python bench/bench_kd_loss_divergences.py [--rounds 21] [--threads N] [--classes 100 1000]

Forward and backward on a CPU, with teacher rows picked by index. Each gradient is checked against float64 before it is
timed. Implementations run in turn; a ratio is the median over the rounds, with quartiles. Rows go to
bench/results/kd_loss_divergences.json.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from bench_kd_loss import ALPHA, TEMPERATURE, inputs, step
from harness import interleave, machine, table, write_results
from torch import Tensor

import kdfast

SIZES = {100: 128, 1000: 1024}
TARGET = 3.0  # smallest acceptable ratio to torch.compile
Loss = Callable[..., Tensor]


def jensen_shannon(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Half the divergences of both networks from their mean, of each row."""
    log_p, log_q = F.log_softmax(z / TEMPERATURE, 1), F.log_softmax(t / TEMPERATURE, 1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    both = [F.kl_div(log_m, x, log_target=True, reduction="none").sum(1) for x in (log_p, log_q)]
    return (both[0] + both[1]) / 2


def decoupled(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """The label against all other classes, plus 8 times the others among themselves, of each row."""
    at, z, t = labels.unsqueeze(1), z / TEMPERATURE, t / TEMPERATURE
    p, q = (torch.softmax(x, 1).gather(1, at).squeeze(1) for x in (z, t))
    target = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    hidden = 1000 * F.one_hot(labels, z.shape[1])
    pair = F.log_softmax(z - hidden, 1), F.log_softmax(t - hidden, 1)
    return target + 8 * F.kl_div(*pair, log_target=True, reduction="none").sum(1)


def standardized(z: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """KL of standardized logits, of each row."""
    pair = [
        F.log_softmax((x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-7) / TEMPERATURE, 1) for x in (z, t)
    ]
    return F.kl_div(*pair, log_target=True, reduction="none").sum(1)


TEXTBOOK = {"jsd": jensen_shannon, "dkd": decoupled, "standardized": standardized}


def textbook(name: str, logits: Tensor, labels: Tensor, teacher: Tensor, rows: Tensor) -> Tensor:
    """The loss in plain PyTorch."""
    divergence = TEXTBOOK[name](logits, teacher[rows].to(logits.dtype), labels).mean()
    return (1 - ALPHA) * F.cross_entropy(logits, labels) + ALPHA * TEMPERATURE**2 * divergence


def ours(name: str, *args: Tensor) -> Tensor:
    """The public function."""
    return kdfast.kd_loss(*args, alpha=ALPHA, temperature=TEMPERATURE, divergence=name)


def check(losses: dict[str, Loss], name: str, args: tuple[Tensor, ...]) -> dict[str, float]:
    """Return each gradient's relative error against the textbook form in float64; raise if it exceeds rounding."""
    exact = args[0].detach().double().requires_grad_()
    _, truth = step(partial(textbook, name), (exact, *args[1:]))
    errors = {}
    for what, loss in losses.items():
        errors[what] = ((step(loss, args)[1].double() - truth).abs().max() / truth.abs().max()).item()
        if not errors[what] < 1e-5:
            raise AssertionError(f"{what} is wrong: relative error {errors[what]:.1e} of the gradient of {name}")
    return errors


def measure(name: str, n: int, c: int, rounds: int) -> list[dict[str, Any]]:
    """Return one row of the table for each implementation."""
    args = inputs(n, c, torch.float32, torch.float16, "cpu")
    torch._dynamo.reset()
    losses: dict[str, Loss] = {
        "kdfast": partial(ours, name),
        "compile": torch.compile(partial(textbook, name), dynamic=False, fullgraph=True),
        "eager": partial(textbook, name),
    }
    errors = check(losses, name, args)
    timings = interleave({what: lambda f=loss: step(f, args) for what, loss in losses.items()}, rounds)
    rows = []
    for what, timing in timings.items():
        median, low, high = timings["kdfast"].ratio_to(timing)
        target = f">= {TARGET:g}x {'met' if median >= TARGET else 'MISSED'}" if what == "compile" else ""
        rows.append(
            {
                "divergence": name,
                "C": c,
                "N": n,
                "what": what,
                "ms": f"{timing.median * 1e3:.3f}",
                "kdfast is faster": "" if what == "kdfast" else f"{median:.2f}x ({low:.2f}-{high:.2f})",
                "target": target,
                "gradient error": f"{errors[what]:.0e}",
            }
        )
    return rows


def main() -> None:
    """Print the table and write bench/results/kd_loss_divergences.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--classes", type=int, nargs="*", default=list(SIZES))
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = [
        row for c in options.classes for name in TEXTBOOK for row in measure(name, SIZES.get(c, 128), c, options.rounds)
    ]
    path = write_results("kd_loss_divergences", rows, rounds=options.rounds)
    print(f"{table(rows)}\n{machine()}\n{path}")


if __name__ == "__main__":
    main()
