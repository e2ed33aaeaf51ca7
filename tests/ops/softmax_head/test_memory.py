"""Peak memory of the softmax head's functions: that of a tile, not a product of the sizes."""

from __future__ import annotations

import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")

MEASURE = """
import numpy as np, torch, kdfast
torch.set_num_threads(1)
def peak(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
n, d, c, k = {sizes}
x, z = torch.randn(n, d), torch.randn(n, c)
y = torch.randint(0, c, (n,))
v = torch.randn(k, c, d + 1)
def run(x, z, y):
    return {call}
run(x[:500], z[:500], y[:500])
open("/proc/self/clear_refs", "w").write("5")
before = peak("VmRSS")
run(x, z, y)
print((peak("VmHWM") - before) / 2**20)
"""

# Sizes N, D, C, K; call; megabytes allowed; megabytes of the buffer that must not be allocated.
CASES = {
    "norms": ((40_000, 128, 100, 1), "kdfast.head_grad_norms(z, y, x)", 30, 40_000 * 100 * 128 * 4 / 2**20),
    "hvp": ((20_000, 64, 50, 32), "kdfast.head_hvp(x, z, v)", 40, 20_000 * 32 * 50 * 4 / 2**20),
    "solve": (
        (40_000, 64, 20, 16),
        "kdfast.head_solve(x, z, v, l2=1e-2, tol=1e-3, method='cg')",
        45,
        40_000 * 320 * 8 / 2**20,
    ),
    "solve for many classes": (
        (1000, 16, 600, 1),
        "kdfast.head_solve(x, z, v, l2=1e-2, tol=1e-3, method='cg')",
        60,
        256 * 600 * 600 * 8 / 2**20,
    ),
    "self": ((90_000, 32, 10, 1), "kdfast.head_self_influence(x, z, y, l2=1e-2)", 100, 90_000 * 330 * 8 / 2**20),
}


@pytest.mark.parametrize(("sizes", "call", "allowed", "forbidden"), CASES.values(), ids=CASES)
def test_peak_memory_is_bounded(run_program, sizes, call, allowed, forbidden):
    assert float(run_program(MEASURE.format(sizes=sizes, call=call))) < allowed
    assert allowed < forbidden / 2
