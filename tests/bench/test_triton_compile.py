"""bench/triton_compile: what is recorded of a launch, and the path of a thread through machine code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = [
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION"),
    pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 replaces the compiler"),
]


@pytest.fixture(autouse=True)
def _path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))


@triton.jit
def copy_kernel(x_ptr, y_ptr, tiles, BLOCK: tl.constexpr):
    """Copy `tiles` blocks, one after the other."""
    for i in range(0, tiles):
        at = i * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + at, tl.load(x_ptr + at) + 1.0)


@triton.jit
def integer_kernel(x_ptr, y_ptr, a, b, c, BLOCK: tl.constexpr):
    """Load as many blocks as integer arithmetic says."""
    wide = a.to(tl.int64) * b - c
    start = tl.minimum(wide >> 5, 3 * c).to(tl.int32)
    stop = tl.where(wide > 2**33, start + (a & 7), start + (b ^ 5) % 8)
    total = tl.zeros((BLOCK,), tl.float32)
    stop += wide % 100003 // c % 3 - a // tl.num_programs(1) % 2
    for i in range(start, stop, 2):
        total += tl.load(x_ptr + tl.abs(i) * BLOCK + tl.arange(0, BLOCK))
        if i * c > a:
            total += tl.load(y_ptr + tl.arange(0, BLOCK))
    tl.store(y_ptr + tl.arange(0, BLOCK), total)


@triton.jit
def chain_kernel(x_ptr, y_ptr, CHAIN: tl.constexpr, BLOCK: tl.constexpr):
    """Look an index up CHAIN times, then load at it and, independently of it, at the end."""
    at = tl.arange(0, BLOCK)
    for _ in tl.static_range(CHAIN):
        at = tl.load(x_ptr + at)
    tl.store(y_ptr + tl.arange(0, BLOCK), tl.load(y_ptr + at) + tl.load(y_ptr + BLOCK + tl.arange(0, BLOCK)))


def quotient(a, b):
    """Return a / b rounded to zero, as in C."""
    return -(-a // b) if a < 0 else a // b


def remainder(a, b):
    """Return the remainder of `quotient`."""
    return a - b * quotient(a, b)


def launch(kernel, *numbers, arch=90, dtype=torch.float32, block=1024, warps=8):
    from triton_compile.driver import recorded_launches

    x = torch.empty(1024, dtype=dtype, device="meta")
    with recorded_launches(arch) as launches:
        kernel[(3, 2)](x, x, *numbers, BLOCK=block, num_warps=warps)
    (only,) = launches
    return only


def trace_of(launched):
    from triton_compile.counts import constants
    from triton_compile.sass import disassemble
    from triton_compile.thread import follow

    code = disassemble(launched.cubin)
    return code, follow(code, constants(launched))


@pytest.mark.parametrize("arch", [80, 90])
def test_records_a_launch(arch):
    launched = launch(copy_kernel, 5, arch=arch)
    assert (launched.kernel, launched.arch, launched.grid) == ("copy_kernel", arch, (3, 2, 1))
    assert (launched.warps, launched.ctas, launched.arguments["tiles"]) == (8, 1, 5)
    assert launched.types == {"x_ptr": "*fp32", "y_ptr": "*fp32", "tiles": "i32", "BLOCK": "constexpr"}
    assert f".target sm_{arch}" in launched.ptx
    assert launched.cubin[:4] == b"\x7fELF"


def test_restores_the_driver_and_forgets_the_kernels():
    from triton.runtime import driver
    from triton_compile.driver import recorded_launches

    before = dict(vars(driver))
    launch(copy_kernel, 5)
    x = torch.empty(1024, device="meta")
    with pytest.raises(KeyError, match="stop"), recorded_launches(80) as launches:  # noqa: PT012
        copy_kernel[(1,)](x, x, 5, BLOCK=1024)
        raise KeyError("stop")
    assert len(launches) == 1
    assert vars(driver) == before
    assert not copy_kernel.device_caches


def test_refuses_the_interpreter():
    script = "from triton_compile.driver import recorded_launches\nwith recorded_launches(90): pass"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=BENCH, timeout=120)
    assert done.returncode != 0
    assert "unset it" in done.stderr


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("chain", [0, 1, 4])
def test_counts_the_loads_that_depend_on_each_other(arch, chain):
    _, trace = trace_of(launch(chain_kernel, chain, arch=arch, dtype=torch.int32))
    assert trace.round_trips.total == chain + 1


@pytest.mark.parametrize("arch", [80, 90])
def test_counts_a_wait_in_each_pass_of_a_loop(arch):
    _, trace = trace_of(launch(copy_kernel, 7, arch=arch))
    assert trace.round_trips.total == 7


def test_counts_loads_into_a_register_that_another_load_must_fill_first():
    from triton_compile.round_trips import RoundTrips
    from triton_compile.sass import Instruction

    def trips(*program):
        found = RoundTrips()
        for name, *operands in program:
            found.issue(Instruction(0, "", name, tuple(operands)), name.startswith("LDG"))
        return found.total

    load = ("LDG.E.64", "R2", "[R8.64]")
    assert trips(load, ("LDG.E.64", "R4", "[R8.64]")) == 1
    assert trips(load, load) == 2
    assert trips(load, ("MOV", "R9", "R3"), ("LDG.E", "R4", "[R8.64]")) == 2
    assert trips(load, ("MOV", "R9", "R4"), ("LDG.E", "R4", "[R8.64]")) == 1


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("tiles", [2, 7, 100])
def test_follows_a_loop(arch, tiles):
    from triton_compile.counts import count

    launched = launch(copy_kernel, tiles, arch=arch)
    code, trace = trace_of(launched)
    assert trace.accesses == {(0, "load", 16): tiles, (1, "store", 16): tiles}
    assert not trace.unknown_branches
    assert code.registers > 0
    assert code.stack == code.local == 0
    if tiles == 100:  # the compiler may unroll the loop a few times
        assert [passes for _, passes in count(launched, 1).loops if 100 // 8 <= passes <= 100]


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize(
    ("a", "b", "c"), [(5, 9, 2), (1_000_003, 77_777, 12), (2**31 - 1, 2**31 - 9, 300_000), (-70_001, 90_009, 17)]
)
def test_computes_integers(a, b, c, arch):
    launched = launch(integer_kernel, a, b, c, arch=arch, block=256, warps=2)
    _, trace = trace_of(launched)
    wide = a * b - c
    start = min(wide >> 5, 3 * c)
    start = (start + 2**31) % 2**32 - 2**31
    stop = start + (a & 7) if wide > 2**33 else start + (b ^ 5) % 8
    stop += remainder(quotient(remainder(wide, 100_003), c), 3) - remainder(quotient(a, 2), 2)
    visited = range(start, stop, 2)
    more = sum(i * c > a for i in visited)
    counted = {0: 0, 1: 0}
    for (argument, kind, width), times in trace.accesses.items():
        assert width == 16
        counted[argument] += times if kind == "load" else 0
    assert counted == {0: len(visited), 1: more}
    assert not trace.unknown_branches


def test_counts_an_element():
    from triton_compile.counts import count

    launched = launch(copy_kernel, 100)
    elements = 6 * 100 * 1024  # six programs
    counted = count(launched, elements)
    assert counted.pipes["FP32"] == pytest.approx(1.0, rel=0.05)
    assert counted.pipes["MEMORY"] == pytest.approx(0.5, rel=0.1)  # 16 bytes in, 16 bytes out
    assert counted.instructions == pytest.approx(sum(counted.pipes.values()))
    assert counted.loads == {"x_ptr": 16}
    assert counted.stores == {"y_ptr": 16}
    # 132 multiprocessors with 4 schedulers at 1.98 GHz, 32 threads an instruction; memory takes 4 cycles
    ceiling = 132 * 4 * 1.98e9 * 32 / max(counted.instructions, 4 * counted.pipes["MEMORY"]) * 8
    assert counted.ceiling(8, 90) == pytest.approx(ceiling)


def test_counts_half_precision_vectors():
    from triton_compile.counts import count

    counted = count(launch(copy_kernel, 4, dtype=torch.bfloat16, block=512, warps=4), 6 * 4 * 512)
    assert counted.loads == {"x_ptr": 8}  # 512 elements of 2 bytes over 128 threads
