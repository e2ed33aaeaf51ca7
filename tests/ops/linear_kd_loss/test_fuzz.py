"""Random calls of `linear_kd_loss` against its formula in float64: no crash and no wrong value."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
import torch

import kdfast

sys.path.insert(0, str(Path(__file__).parent))

import naive

ROUNDING = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 2**-5, torch.float16: 2**-8}


def draw_teacher(rng, n, v, temperature, divergence):
    """A random teacher, its rows, and what each row is compared with."""
    m = n + rng.randint(0, 3)
    kind = rng.choice(["dense", "hidden", "topk", "probs"])
    rows = torch.randint(0, m, (n,)) if n and (m > n or rng.random() < 0.5) else None
    m = n if rows is None else m
    index = range(n) if rows is None else rows.tolist()
    if kind == "hidden":
        k, cap, scale = rng.randint(1, 5), rng.choice([None, 3.0]), rng.choice([1.0, 0.7])
        hidden, weight = torch.randn(m, k, dtype=torch.float64), torch.randn(v, k, dtype=torch.float64)
        logits = naive.layer(hidden, weight, None, cap, scale)
        return kdfast.LinearTeacher(hidden, weight, None, cap, scale), rows, [(logits[i],) for i in index], {}
    logits = 2 * torch.randn(m, v, dtype=torch.float64)
    if kind == "probs":
        return logits.softmax(1), rows, [(logits[i],) for i in index], {"teacher_kind": "probs"}
    if kind == "dense" or divergence == "jsd" or m == 0:
        return logits, rows, [(logits[i],) for i in index], {}
    topk = kdfast.topk_teacher(logits, rng.randint(1, v), temperature)
    return topk, rows, [(topk.values[i], topk.classes[i].long(), topk.tail[i].double()) for i in index], {}


def run_case(seed):
    """Draw a call, and compare losses and gradients."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    n, h, v = rng.randint(0, 9), rng.randint(1, 6), rng.randint(1, 40)
    dtype = rng.choice(list(ROUNDING))
    temperature, alpha = rng.choice([1.0, 2.0, 3.5]), rng.choice([0.0, 0.3, 1.0])
    divergence, beta = rng.choice(["forward", "reverse", "jsd"]), rng.choice([0.2, 0.5])
    softcap, scale = rng.choice([None, None, 4.0]), rng.choice([1.0, 0.5, 1.3])
    inputs = [torch.randn(n, h), torch.randn(v, h) / h**0.5, torch.randn(v) if rng.random() < 0.5 else None]
    inputs = [None if x is None else x.to(dtype).requires_grad_(rng.random() < 0.8) for x in inputs]
    labels = torch.randint(0, v, (n,))
    labels[torch.rand(n) < rng.choice([0.0, 0.3, 1.0])] = naive.IGNORE
    teacher, rows, of_rows, kind = draw_teacher(rng, n, v, temperature, divergence)
    weights = torch.rand(n) if rng.random() < 0.3 else None
    reduction = rng.choice(["mean", "sum", "none"])
    t_squared = rng.random() < 0.8
    options = {"alpha": alpha, "temperature": temperature, "t_squared": t_squared, "weights": weights}
    loss = kdfast.linear_kd_loss(
        inputs[0], inputs[1], labels, teacher, rows, bias=inputs[2], divergence=divergence, beta=beta, softcap=softcap,
        logit_scale=scale, reduction=reduction, chunk=rng.choice(["auto", 1, 3, 50]),
        memory=rng.choice(["fast", "low"]), **options, **kind,
    )  # fmt: skip
    exact = [None if x is None else x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    expected = naive.loss(naive.layer(*exact, softcap, scale), labels, of_rows, kind=divergence, beta=beta, **options)
    if reduction != "none":
        counted = labels != naive.IGNORE
        divisor = (counted.sum() if weights is None else weights[counted].double().sum()).clamp_min(1e-30)
        expected = expected.sum() / (divisor if reduction == "mean" else 1)
    pairs = [(loss.detach(), expected.detach())]
    trained = [(x, y) for x, y in zip(inputs, exact, strict=True) if x is not None and x.requires_grad]
    if trained:
        up = torch.rand_like(loss)
        pairs += zip(
            torch.autograd.grad(loss, [x for x, _ in trained], up),
            torch.autograd.grad(expected, [y for _, y in trained], up.double()),
            strict=True,
        )
    # The tail of a top-k teacher is float32; values near zero are sums that cancel.
    tolerance = max(ROUNDING[dtype], 1e-6 if isinstance(teacher, kdfast.TopKTeacher) else 0)
    for i, (got, truth) in enumerate(pairs):
        assert got.isfinite().all(), f"seed {seed}, result {i}"
        error = float((got.double() - truth).norm())
        assert error <= tolerance * (float(truth.norm()) + 0.1), f"seed {seed}, result {i}: error {error:.1e}"


@pytest.mark.parametrize("block", range(4))
def test_random_calls(block):
    for seed in range(25 * block, 25 * block + 25):
        run_case(seed)


@pytest.mark.slow
def test_thousands_of_random_calls():
    for seed in range(100, 5100):
        run_case(seed)
