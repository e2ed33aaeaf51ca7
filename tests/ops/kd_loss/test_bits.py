"""Native kernel: equal bits on every instruction set and for any number of threads, rounding to nearest even."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from kdfast.ops.kd_loss import native, topk_teacher
from kdfast.ops.kd_loss.call import KDCall

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(n, c, dtype):
    labels, rows = torch.randint(0, c, (n,)), torch.randint(0, n + 3, (n,))
    labels[1], rows[0] = -100, n
    return (3 * torch.randn(n, c)).to(dtype), labels, (3 * torch.randn(n + 3, c)).half(), rows


def divergence_bits(args, temperature, isa_limit):
    found = []
    for alpha, divergence in itertools.product([0.5, 1.0], ["jsd", "dkd", "standardized"]):
        numbers = (alpha, temperature, True, -100, "none", False, divergence, 0.3, 0.7)
        call = KDCall(*args, None, None, None, None, None, *numbers)
        found += native.kd_loss(call, need_grad=True, isa_limit=isa_limit)
    return found


def bits(isa_limit, threads=1):
    """Return the bytes of losses and gradients over odd shapes for one instruction set."""
    torch.manual_seed(1)
    torch.set_num_threads(threads)
    found = []
    for dtype, (n, c), t, reverse in itertools.product(
        DTYPES, [(3, 5), (40, 100), (9, 3001), (2, 8192)], [1.0, 4.0, 3.0], [False, True]
    ):
        z, y, teacher, r = case(n, c, dtype)
        for sparse in (None, topk_teacher(teacher, 3, t)):
            values, classes, tail = sparse or (teacher, None, None)
            call = KDCall(z, y, values, r, classes, tail, None, None, None, 0.5, t, True, -100, "none", reverse)
            found += native.kd_loss(call, need_grad=True, isa_limit=isa_limit)
        if not reverse:
            found += divergence_bits((z, y, teacher, r), t, isa_limit)
    return found


@pytest.mark.parametrize("isa_limit", [0, 1])
def test_every_instruction_set_and_thread_count_gives_the_same_bits(isa_limit):
    before = torch.get_num_threads()
    try:
        widest, other, threaded = bits(2), bits(isa_limit), bits(2, threads=3)
    finally:
        torch.set_num_threads(before)
    for a, b, d in zip(widest, other, threaded, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        assert torch.equal(a.view(torch.uint8), d.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_to_half_precision_is_to_nearest_even(dtype):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    midway = (every.float() + every.float().nextafter(torch.tensor(math.inf))) / 2
    exact_ties = (every[:-1].float() + every[1:].float()) / 2
    for values in (every.float(), midway, exact_ties, torch.randn(4096) * 1e-6, torch.randn(4096) * 1e5):
        stored = values.to(dtype).view(1, -1)
        scaled = native.scale_rows(stored, torch.tensor(1.0), 0.5, in_place=False)
        expected = (stored.float() * 0.5).to(dtype)
        assert torch.equal(scaled.isnan(), expected.isnan())
        keep = ~expected.isnan()
        assert torch.equal(scaled[keep].view(torch.int16), expected[keep].view(torch.int16))
