"""Long rows of the native kernel, computed in blocks: blocks far apart, masked, or of negligible weight."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import kdfast
from kdfast.ops.kd_loss import native
from kdfast.ops.kd_loss.call import KDCall

N, C, BLOCK = 3, 100_001, 4096  # csrc/kd_loss/long_rows.h
INF = math.inf


def plain():
    labels, rows = torch.tensor([5, C - 1, 50_000]), torch.tensor([2, 0, 2])
    return 3 * torch.randn(N, C), labels, 3 * torch.randn(4, C), rows


def rising(z, t):
    """Logits increase from block to block."""
    step = torch.arange(C) // BLOCK
    return z + step, t + 2 * step


def falling(z, t):
    return [x.flip(1) for x in rising(z, t)]


def apart(z, t):
    """Some blocks have terms that vanish beside the others."""
    z[:, : 2 * BLOCK] -= 1e4
    t[:, BLOCK : 3 * BLOCK] -= 1e4
    t[:, -BLOCK:] += 100
    return z, t


def last_far(z, t):
    """The last block is far below the others."""
    z[:, -BLOCK:] -= 50
    t[:, -BLOCK:] -= 1e4
    return z, t


def masked_first(z, t):
    z[:, : BLOCK + 1], t[:, : BLOCK + 1] = -INF, -INF
    return z, t


def masked_between(z, t):
    z[:, 2 * BLOCK : 4 * BLOCK], t[:, 2 * BLOCK : 4 * BLOCK] = -INF, -INF
    return z, t


def equal(z, t):
    return torch.full_like(z, 1e4), torch.full_like(t, -1e4)


PLACES = {"plain": lambda z, t: (z, t)} | {
    f.__name__: f for f in (rising, falling, apart, last_far, masked_first, masked_between, equal)
}


def both(z, y, t, r, dtype, teacher_dtype, **options):
    """Return losses and gradient, from the kernel and in float64."""
    found = []
    z, t = z.to(dtype), t.to(teacher_dtype)
    for x, backend in ((z, "native"), (z.double(), "reference")):
        x = x.detach().requires_grad_()
        loss = kdfast.kd_loss(x, y, t, r, reduction="none", backend=backend, **options)
        found.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_matches_float64(place, direction):
    z, y, t, r = plain()
    z, t = PLACES[place](z, t)
    if place.startswith("masked"):
        y[0] = C - 2
    for (dtype, teacher_dtype), temperature in itertools.product(
        [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)], [1.0, 3.0, 4.0]
    ):
        (loss, grad), (truth, slope) = both(
            z, y, t, r, dtype, teacher_dtype, temperature=temperature, direction=direction
        )
        scale = slope.abs().max()
        assert (loss - truth).abs().max() <= 3e-6 * truth.abs().max()
        rounding = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}[dtype]
        assert (grad - slope).abs().max() <= (2e-5 if direction == "reverse" else 3e-6) * scale + rounding * scale


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 1.0}, {"alpha": 0.3, "t_squared": False}])
def test_one_part_of_the_loss(options):
    (loss, grad), (truth, slope) = both(*plain(), torch.float32, torch.float16, temperature=2.0, **options)
    assert (loss - truth).abs().max() <= 3e-6 * truth.abs().max()
    assert (grad - slope).abs().max() <= 3e-6 * slope.abs().max()


def test_any_strides_ignored_rows_and_weights():
    z, y, t, r = plain()
    y[1] = -100
    weights = torch.tensor([0.5, math.nan, 2.0])
    straight = both(z, y, t, r, torch.float32, torch.float16, weights=weights)
    z, t = z.t().contiguous().t(), t.repeat(1, 2)[:, :C]
    crooked = both(z, y, t, r, torch.float32, torch.float16, weights=weights)
    for a, b in zip(straight[0], crooked[0], strict=True):
        assert torch.equal(a, b)
    assert straight[0][0][1] == 0
    assert (straight[0][1][1] == 0).all()


@pytest.mark.parametrize("value", [math.nan, INF])
@pytest.mark.parametrize("operand", [0, 2])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_nan_and_infinity_are_not_hidden(operand, value, direction):
    """Even in a block whose terms vanish."""
    args = list(plain())
    args[operand][:, :BLOCK] -= 1e5
    args[operand][2, 7] = value
    args[3][0] = 1
    loss, grad = both(*args, torch.float32, torch.float32, direction=direction)[0]
    assert loss[0].isfinite()
    assert loss[2].isnan()
    assert grad[2].isnan().any()


@pytest.mark.parametrize("operand", [0, 2])
def test_one_side_with_all_classes_masked(operand):
    args = list(plain())
    args[operand][:] = -INF
    loss, grad = both(*args, torch.float32, torch.float32)[0]
    assert loss.isnan().all()
    assert grad.isnan().any(1).all()


def test_class_masked_on_one_side():
    """Infinite forward divergence if only the student masks it, reverse if only the teacher does."""
    z, y, t, r = plain()
    y[:] = 9 * BLOCK
    for lacking, direction in ((z, "forward"), (t, "reverse")):
        other = "reverse" if direction == "forward" else "forward"
        kept = lacking[:, :BLOCK].clone()
        lacking[:, :BLOCK] = -INF
        loss = both(z, y, t, r, torch.float32, torch.float32, direction=direction)
        assert loss[0][0].equal(torch.full((N,), INF))
        (loss, grad), (truth, slope) = both(z, y, t, r, torch.float32, torch.float32, direction=other)
        assert (loss - truth).abs().max() <= 3e-6 * truth.abs().max()
        assert (grad - slope).abs().max() <= 2e-5 * slope.abs().max()
        lacking[:, :BLOCK] = kept


def test_class_masked_by_the_student_with_no_teacher_probability():
    z, y, t, r = plain()
    y[0] = 9 * BLOCK
    z[:, :BLOCK] = -INF
    t[:, :BLOCK] -= 1e5
    (loss, grad), (truth, slope) = both(z, y, t, r, torch.float32, torch.float32)
    assert truth.isfinite().all()
    assert (loss - truth).abs().max() <= 3e-6 * truth.abs().max()
    assert (grad - slope).abs().max() <= 3e-6 * slope.abs().max()


@pytest.mark.parametrize("reverse", [False, True])
def test_every_instruction_set_gives_the_same_bits(reverse):
    z, y, t, r = plain()
    z, t = apart(z, t)
    for temperature in (3.0, 4.0):
        call = KDCall(z, y, t.half(), r, None, None, None, None, None, 0.5, temperature, True, -100, "none", reverse)
        widest, *others = [native.kd_loss(call, need_grad=True, isa_limit=isa) for isa in (2, 1, 0)]
        for found in others:
            for a, b in zip(widest, found, strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))
