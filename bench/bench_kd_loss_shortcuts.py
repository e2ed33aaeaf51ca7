"""Speedup by the shortcuts of `kd_loss` on a CPU: C++ fast path, the last gradient's memory used again, huge pages.

    python bench/bench_kd_loss_shortcuts.py

Each is timed with the shortcut and without it, interleaved, forward and backward, after checking that the results have
the same bits. Rows go to bench/results/kd_loss_shortcuts.json.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from unittest import mock

import torch
from bench_kd_loss import inputs, step
from harness import interleave, machine, table, write_results
from torch import Tensor

import kdfast
from kdfast.ops import huge_pages
from kdfast.ops.kd_loss import gradient_buffer

SIZES = ((10, 128), (100, 128), (1000, 1024), (32_000, 256), (131_072, 64), (131_072, 256))

Loss = Callable[..., Tensor]


def without_fast_path(*args: Tensor) -> Tensor:
    """Call with an explicit backend, bypassing the fast path."""
    return kdfast.kd_loss(*args, backend="native")


def without_reuse(loss: Loss) -> Loss:
    """Take fresh memory for every gradient."""

    def fresh(*args: Tensor) -> Tensor:
        os.environ["KDFAST_REUSE_GRADIENT"] = "0"
        try:
            return loss(*args)
        finally:
            del os.environ["KDFAST_REUSE_GRADIENT"]

    return fresh


def without_huge_pages(loss: Loss) -> Loss:
    """Leave the size of pages to the system."""

    def small(*args: Tensor) -> Tensor:
        with mock.patch.object(huge_pages, "MIN_BYTES", sys.maxsize):
            return loss(*args)

    return small


def measure(n: int, c: int, rounds: int) -> list[dict[str, object]]:
    """Return one row per shortcut."""
    args = inputs(n, c, torch.float32, torch.float16, "cpu")
    contenders: dict[str, Loss] = {"fast path": without_fast_path}
    if gradient_buffer.MIN_BYTES <= n * c * 4 <= gradient_buffer.MAX_BYTES:
        contenders["reused gradient"] = without_reuse(kdfast.kd_loss)
    elif n * c * 4 > gradient_buffer.MAX_BYTES:
        contenders["huge pages"] = without_huge_pages(kdfast.kd_loss)
    rows = []
    for name, loss in contenders.items():
        for mine, other in zip(step(kdfast.kd_loss, args), step(loss, args), strict=True):
            assert torch.equal(mine, other), f"without the {name}, results differ"
        timings = interleave(
            {"with": lambda: step(kdfast.kd_loss, args), "without": lambda f=loss: step(f, args)}, rounds
        )
        median, low, high = timings["with"].ratio_to(timings["without"])
        rows.append(
            {
                "shortcut": name,
                "C": c,
                "N": n,
                "with, us": f"{timings['with'].median * 1e6:.1f}",
                "without, us": f"{timings['without'].median * 1e6:.1f}",
                "without / with": f"{median:.2f}x ({low:.2f}-{high:.2f})",
            }
        )
    return rows


def main() -> None:
    """Print the table and write bench/results/kd_loss_shortcuts.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--threads", type=int, default=None)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = [row for c, n in SIZES for row in measure(n, c, options.rounds)]
    path = write_results("kd_loss_shortcuts", rows, rounds=options.rounds)
    print(f"{table(rows)}\n{machine()}\n{path}")


if __name__ == "__main__":
    main()
