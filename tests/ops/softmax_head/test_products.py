"""Fused and unfused Hessian products against float64."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import kdfast
from kdfast.errors import DataError
from kdfast.ops.softmax_head import hvp, native

FUSED = native.can_fuse_products(torch.zeros(1, 2, 2), False)
needs_fused = pytest.mark.skipif(not FUSED, reason="needs a processor with AVX-512")


def make_operands(n, d, c, k, bias, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, z = torch.randn(n, d, generator=g), 2 * torch.randn(n, c, generator=g)
    return x, z, torch.randn(k, c, d + bias, generator=g)


def relative(found, truth):
    return float((found.double() - truth).norm() / truth.norm())


# N, D, C, K: N near multiples of 96, the others near multiples of 16 and 64, where the kernel has remainders.
SIZES = [
    (1, 1, 2, 1),
    (15, 16, 3, 1),
    (96, 17, 16, 1),
    (97, 64, 10, 2),
    (191, 65, 17, 1),
    (200, 100, 20, 5),
    (500, 130, 68, 1),
    (1000, 47, 100, 1),
    (1003, 512, 101, 2),
    (300, 2000, 3, 7),
]


@needs_fused
@pytest.mark.parametrize(("n", "d", "c", "k"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("alpha", "temperature"), [(0.0, 4.0), (0.3, 2.0), (1.0, 4.0)])
def test_fused_products_match_float64(n, d, c, k, bias, alpha, temperature):
    x, z, v = make_operands(n, d, c, k, bias)
    assert native.can_fuse_products(v, bias)
    options = {"l2": 0.01, "bias": bias, "alpha": alpha, "temperature": temperature}
    found = kdfast.head_hvp(x, z, v, **options)
    assert relative(found, kdfast.head_hvp(x.double(), z.double(), v.double(), **options)) < 2e-6


@pytest.mark.parametrize(("n", "d", "c", "k"), SIZES)
@pytest.mark.parametrize("bias", [False, True])
def test_unfused_products_match_float64(n, d, c, k, bias, monkeypatch):
    monkeypatch.setattr(hvp, "can_fuse_products", lambda *_: False)
    x, z, v = make_operands(n, d, c, k, bias)
    truth = kdfast.head_hvp(x.double(), z.double(), v.double(), bias=bias)
    assert relative(kdfast.head_hvp(x, z, v, bias=bias), truth) < 2e-6


@needs_fused
def test_fused_products_of_strided_operands_and_threads():
    x, z, v = make_operands(700, 33, 12, 2, True)
    truth = kdfast.head_hvp(x, z, v)
    # NaN around the operands must not be read, not even after the last feature.
    wide_x, wide_z = torch.full((700, 70), torch.nan), torch.full((700, 30), torch.nan)
    wide_x[:, 5:38], wide_z[:, 7:19] = x, z
    assert torch.equal(kdfast.head_hvp(wide_x[:, 5:38], wide_z[:, 7:19], v), truth)
    permuted = v.permute(1, 0, 2).contiguous().permute(1, 0, 2)
    assert relative(kdfast.head_hvp(x.T.contiguous().T, z, permuted), truth) < 1e-6
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            first = kdfast.head_hvp(x, z, v)
            assert torch.equal(kdfast.head_hvp(x, z, v), first)
            assert relative(first, truth) < 1e-6
    finally:
        torch.set_num_threads(threads)


@needs_fused
@pytest.mark.parametrize("tile_rows", [1, 95, 96, 250, None])
def test_fused_products_do_not_depend_on_tiles(tile_rows):
    x, z, v = make_operands(500, 40, 7, 1, True)
    assert relative(kdfast.head_hvp(x, z, v, tile_rows=tile_rows), kdfast.head_hvp(x, z, v)) < 1e-6


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=needs_fused)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_error_names_nonfinite_operand(fused, value, monkeypatch):
    if not fused:
        monkeypatch.setattr(hvp, "can_fuse_products", lambda *_: False)
    for bad, name in enumerate(["`features` of sample 30", "`logits` of sample 30", "`v`"]):
        operands = make_operands(130, 20, 5, 1, True)
        (operands[bad][0, 3] if bad == 2 else operands[bad][30])[1] = value
        with pytest.raises(DataError, match=f"{name} is not finite"):
            kdfast.head_hvp(*operands)


AT_PAGE_END = """
import ctypes, mmap, sys, torch, kdfast

def at_page_end(x):
    pages = -(-x.numel() * 4 // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    guard = ctypes.c_void_p(start + pages * mmap.PAGESIZE)
    assert ctypes.CDLL(None).mprotect(guard, ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    out = torch.frombuffer(memory, dtype=torch.float32, count=x.numel(), offset=pages * mmap.PAGESIZE - 4 * x.numel())
    return out.view(x.shape).copy_(x)

sizes = [(97, 1, 2, 97), (100, 1, 3, 100), (97, 5, 3, 97), (97, 3, 2, 97), (300, 17, 10, 1), (96, 15, 4, 96)]
for n, d, c, stored in sizes:
    for bias in (False, True):
        x, z, v = (at_page_end(torch.randn(*shape)) for shape in ((stored, d), (n, c), (c, d + bias)))
        x = x.expand(n, d)
        truth = kdfast.head_hvp(x.double(), z.double(), v.double(), bias=bias)
        assert (kdfast.head_hvp(x, z, v, bias=bias) - truth).norm() < 1e-5 * truth.norm()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects a page")
def test_kernel_reads_nothing_after_operands():
    done = subprocess.run([sys.executable, "-c", AT_PAGE_END], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr


@needs_fused  # the library sums a tile in float32
def test_error_does_not_grow_with_samples():
    x, z, v = torch.rand(400_000, 4), torch.randn(400_000, 2), torch.rand(2, 5) + 1
    truth = kdfast.head_hvp(x.double(), z.double(), v.double())
    assert float((kdfast.head_hvp(x, z, v) - truth).abs().max() / truth.abs().max()) < 3e-6


def test_head_of_bias_only():
    z, v = torch.randn(200, 3), torch.randn(3, 1)
    truth = kdfast.head_hvp(torch.zeros(200, 0).double(), z.double(), v.double())
    assert relative(kdfast.head_hvp(torch.zeros(200, 0), z, v), truth) < 2e-6


def test_tensors_with_pending_negation():
    x, z, v = make_operands(130, 20, 5, 1, True)
    found = kdfast.head_hvp(*(torch._neg_view(part) for part in (x, z, v)))
    assert torch.equal(found, kdfast.head_hvp(-x, -z, -v))


def test_many_or_float64_products_are_not_fused():
    assert not native.can_fuse_products(torch.zeros(64, 100, 512), False)
    assert not native.can_fuse_products(torch.zeros(1, 2, 2, dtype=torch.float64), False)
