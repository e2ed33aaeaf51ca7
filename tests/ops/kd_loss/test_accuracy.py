"""Loss and gradient are as close to float64 as PyTorch in the same dtype, plus 1e-6, also for extreme inputs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import kdfast
from kdfast.ops.kd_loss import topk_teacher

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["forward", "reverse"]


def plain(n=4, c=40):
    labels = torch.randint(0, c, (n,))
    return 3 * torch.randn(n, c), labels, 3 * torch.randn(n + 3, c), torch.randint(0, n + 3, (n,))


def one_large(value):
    z, y, t, r = plain()
    z[:, 3], t[:, 7] = value, value
    return z, y, t, r


def all_large(value):
    z, y, t, r = plain()
    return (z + value).round(), y, (t + value).round(), r


def masked(z, y, t, r):
    """Mask every fourth class on both sides."""
    z[:, 3::4], t[:, 3::4] = -math.inf, -math.inf
    return z, torch.where(y % 4 == 3, y - 1, y), t, r


def repeated():
    z, y, t, _ = plain(6)
    return z, y, t, torch.tensor([8, 0, 8, 3, 0, 8])


def expanded():
    z, y, t, r = plain()
    return z[:1].expand(4, -1), y, t[:1].expand(7, -1), r


def transposed():
    z, y, t, r = plain()
    return z.t().contiguous().t(), y, t.t().contiguous().t(), r


def ignored():
    z, y, t, r = plain()
    y[1] = -100
    return z, y, t, r


PLACES = {
    "one logit 1e4": lambda: one_large(1e4),
    "one logit -1e4": lambda: one_large(-1e4),
    "all near 1e4": lambda: all_large(1e4),
    "all near -1e4": lambda: all_large(-1e4),
    "-inf on both sides": lambda: masked(*plain()),
    "one class": lambda: plain(4, 1),
    "two classes": lambda: plain(4, 2),
    "odd classes": lambda: plain(3, 1031),
    "repeated, unordered rows": repeated,
    "expanded": expanded,
    "transposed": transposed,
    "an ignored row": ignored,
}


def errors(args, backend, **options):
    """Relative errors against float64 of loss and gradient: the backend's, and the reference's in the same dtype."""
    results = []
    for z, name in ((args[0].double(), "reference"), (args[0], backend), (args[0], "reference")):
        x = z.detach().requires_grad_()
        loss = kdfast.kd_loss(x, *args[1:], **options, backend=name)
        results.append((loss.detach().double(), torch.autograd.grad(loss.sum(), x)[0].double()))
    truth, ours, theirs = results
    assert all(value.isfinite().all() for value in truth)
    scales = [value.abs().max().clamp_min(1e-12) for value in truth]
    return [
        [((a - b).abs().max() / scale).item() for a, b, scale in zip(found, truth, scales, strict=True)]
        for found in (ours, theirs)
    ]


def no_worse(args, **options):
    ours, theirs = errors(args, "native", **options)
    return all(a <= b + 1e-6 for a, b in zip(ours, theirs, strict=True)), (ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("place", PLACES)
def test_error_at_most_pytorchs(place, direction, dtype):
    z, y, t, r = PLACES[place]()
    for temperature, reduction in itertools.product((1.0, 2.0, 4.0, 0.7), ("mean", "none")):
        options = {"temperature": temperature, "direction": direction, "reduction": reduction}
        ok, found = no_worse((z.to(dtype), y, t, r), **options)
        assert ok, (options, found)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("k", [0, 1, 5, 33])
@pytest.mark.parametrize("spreads", [(1, 1), (10, 1), (1, 100), (100, 1), (100, 100), (1e4, 10), (10, 1e4), (1e4, 1e4)])
def test_error_at_most_pytorchs_for_far_spread_logits(spreads, k, direction):
    for temperature, alpha, hidden in itertools.product((1.0, 4.0, 3.0, 0.5), (0.5, 1.0), (False, True)):
        z, y, t, r = plain(3, 33)
        z, t = z * spreads[0], t * spreads[1]
        if hidden:
            z, y, t, r = masked(z, y, t, r)
        teacher = topk_teacher(t, k, temperature) if k else t
        options = {"temperature": temperature, "direction": direction, "alpha": alpha}
        ok, found = no_worse((z, y, teacher, r), **options)
        assert ok, (options, hidden, found)


@pytest.mark.parametrize("k", [0, 33])
def test_reverse_divergence_from_classes_that_the_teacher_rules_out(kd_loss_backend, k):
    z, y, t, r = plain(3, 33)
    t[:, 5] = -math.inf
    teacher = topk_teacher(t, k, 4.0) if k else t
    options = {"direction": "reverse", "reduction": "none", "backend": kd_loss_backend}
    assert (kdfast.kd_loss(z, y, teacher, r, **options) == math.inf).all()
    z[:, 5] = -1e6  # its probability underflows to zero
    assert kdfast.kd_loss(z, y, teacher, r, **options).isfinite().all()
    z[:, 5] = -math.inf
    y[:] = 0
    assert kdfast.kd_loss(z, y, teacher, r, **options).isfinite().all()


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("k", [0, 3])
def test_no_row_counts(kd_loss_backend, direction, reduction, k):
    z, y, t, r = plain(4, 9)
    teacher = topk_teacher(t, k, 4.0) if k else t
    for rows in (4, 0):
        x = (z[:rows] * math.nan).requires_grad_()
        loss = kdfast.kd_loss(
            x,
            y.fill_(-100)[:rows],
            teacher,
            r[:rows],
            direction=direction,
            reduction=reduction,
            backend=kd_loss_backend,
        )
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert loss.shape == ((rows,) if reduction == "none" else ())
        assert (loss == 0).all()
        assert grad.shape == (rows, 9)
        assert (grad == 0).all()
