"""Operands, teachers and tolerances of the tests that compare `linear_kd_loss` with its formula."""

from __future__ import annotations

import itertools

import naive
import torch

import kdfast

ROUNDING = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
N, H, K, V = 11, 6, 4, 23


def operands(dtype, seed=0, n=N):
    """Hidden states, weights, bias, and labels with ignored rows."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((n, H), (V, H), (V,)))
    labels = torch.randint(0, V, (n,), generator=g)
    labels[::4] = naive.IGNORE
    return *((0.7 * x).to(dtype).requires_grad_() for x in (hidden, weight, bias)), labels


def teacher_of(kind, temperature, n=N, seed=1):
    """A teacher, its rows, and what each row of the student is compared with."""
    g = torch.Generator().manual_seed(seed)
    if kind == "hidden":
        hidden, weight, bias = (torch.randn(*size, generator=g, dtype=torch.float64) for size in ((n, K), (V, K), (V,)))
        teacher = kdfast.LinearTeacher(hidden, weight, bias, softcap=4.0, logit_scale=1.3)
        return teacher, None, [(row,) for row in naive.layer(hidden, weight, bias, 4.0, 1.3)]
    logits = torch.randn(n + 5, V, generator=g, dtype=torch.float64) * 2
    if kind == "dense":
        return logits[:n], None, [(row,) for row in logits]
    rows = torch.randint(0, n + 5, (n,), generator=g)
    if kind == "rows":
        return logits, rows, [(logits[r],) for r in rows]
    topk = kdfast.topk_teacher(logits, 5, temperature)
    return topk, rows, [(topk.values[r], topk.classes[r].long(), topk.tail[r].double()) for r in rows]


def relative_error(got, expected):
    return float((got.detach().double() - expected).norm() / expected.norm().clamp_min(1e-300))


CASES = [
    (teacher, divergence)
    for teacher, divergence in itertools.product(("dense", "rows", "topk", "hidden"), ("forward", "reverse", "jsd"))
    if (teacher, divergence) != ("topk", "jsd")
]
