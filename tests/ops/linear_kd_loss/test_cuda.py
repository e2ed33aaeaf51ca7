"""`linear_kd_loss` on a GPU: the formula in float64 on the CPU, and gradients written over the logits."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

import kdfast
from kdfast.ops.kd_loss.dispatch import run_kernel

sys.path.insert(0, str(Path(__file__).parent))

import formula_cases
import naive
from in_place import DIVERGENCES, make_kernel_call

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def to_gpu(x):
    """Copy a tensor, or the tensors of a tuple or a dataclass, to the device."""
    if isinstance(x, torch.Tensor):
        return x.cuda()
    if isinstance(x, tuple):
        parts = [to_gpu(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(x):
        return dataclasses.replace(x, **{f.name: to_gpu(getattr(x, f.name)) for f in dataclasses.fields(x)})
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "divergence"), formula_cases.CASES)
@pytest.mark.parametrize(("memory", "softcap"), [("fast", None), ("low", 3.0)])
def test_matches_the_formula(kind, divergence, dtype, memory, softcap):
    hidden, weight, bias, labels = formula_cases.operands(dtype)
    teacher, rows, of_rows = formula_cases.teacher_of(kind, 2.0)
    options = {"alpha": 0.6, "temperature": 2.0}
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    expected = (
        naive.loss(naive.layer(*exact, softcap, 1.0), labels, of_rows, kind=divergence, beta=0.3, **options).sum()
        / (labels >= 0).sum()
    )
    ours = [x.detach().cuda().requires_grad_() for x in (hidden, weight, bias)]
    loss = kdfast.linear_kd_loss(
        ours[0], ours[1], labels.cuda(), to_gpu(teacher), to_gpu(rows), bias=ours[2], divergence=divergence, beta=0.3,
        softcap=softcap, memory=memory, chunk=4, **options,
    )  # fmt: skip
    tolerance = max(formula_cases.ROUNDING[dtype], 1e-5)
    assert formula_cases.relative_error(loss.cpu(), expected.detach()) < tolerance
    for got, truth in zip(torch.autograd.grad(loss, ours), torch.autograd.grad(expected, exact), strict=True):
        assert formula_cases.relative_error(got.cpu(), truth) < tolerance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("classes", [10, 1000, 20000, 100000])
def test_kernels_run_in_place(classes, kind, dtype):
    # Many rows, so that threads of a row that overtake each other are found.
    call = to_gpu(make_kernel_call(kind, 2000 if classes <= 1000 else 200, classes, dtype))
    loss, grad = run_kernel("triton", call, True)
    z = call.logits.clone()
    loss_in_place, grad_in_place = run_kernel("triton", call.replace(logits=z), True, grad=z)
    assert grad_in_place is z
    torch.testing.assert_close(loss_in_place, loss, rtol=0, atol=0)
    torch.testing.assert_close(z, grad, rtol=0, atol=0)
