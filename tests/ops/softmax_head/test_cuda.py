"""CUDA kernels of the softmax head against the reference in float64."""

from __future__ import annotations

import pytest
import torch

import kdfast
from kdfast.ops import backends
from kdfast.ops.softmax_head import curvature, native, residuals
from kdfast.ops.softmax_head.residuals import LossConfig

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and backends.is_available("softmax_head", "cuda", "cuda")),
        reason="needs a CUDA device and a build with nvcc",
    ),
]
LOSSES = [LossConfig(0.0), LossConfig(0.3, 4.0), LossConfig(1.0, 2.0)]


def relative(found, truth):
    return float((found.double().cpu() - truth).norm() / truth.norm())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("classes", [2, 10, 33, 100, 1000, 50_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kernels_match_reference(dtype, classes, loss):
    z, t = torch.randn(37, classes, dtype=torch.float64) * 3, torch.randn(37, classes, dtype=torch.float64)
    x, y = torch.randn(37, 70, dtype=torch.float64), torch.randint(0, classes, (37,))
    operands = [v.cuda() if v is y else v.to("cuda", dtype) for v in (z, y, t)]
    tolerance = 100 * torch.finfo(dtype).eps
    truth = residuals.reference_residuals(z, y, t, loss)
    assert relative(native.residuals(*operands, *loss), truth) < tolerance
    norms = native.norms(*operands, x.to("cuda", dtype), 1.0, *loss)
    assert relative(norms, truth.norm(dim=1) * (x.square().sum(1) + 1).sqrt()) < tolerance
    a = torch.randn(37, 11, classes, dtype=torch.float64)
    products = a.to("cuda", dtype)
    native.apply_logit_hessian_(products, operands[0], *loss)
    assert relative(products, curvature.reference_curvature_(a, curvature.curvature_terms(z, loss))) < tolerance


def test_functions_match_cpu():
    x, z, y = torch.randn(500, 20).double(), torch.randn(500, 7).double(), torch.arange(500) % 7
    v = torch.randn(3, 7, 21).double()
    xg, zg, yg, vg = (value.cuda() for value in (x, z, y, v))
    pairs = [
        (kdfast.head_grad_norms(zg, yg, xg), kdfast.head_grad_norms(z, y, x)),
        (kdfast.head_hvp(xg, zg, vg, l2=0.1), kdfast.head_hvp(x, z, v, l2=0.1)),
        (kdfast.head_solve(xg, zg, vg, l2=0.1), kdfast.head_solve(x, z, v, l2=0.1)),
        (
            kdfast.head_self_influence(xg, zg, yg, l2=0.1, corrected=True),
            kdfast.head_self_influence(x, z, y, l2=0.1, corrected=True),
        ),
        (kdfast.head_newton(xg, yg, l2=0.1), kdfast.head_newton(x, y, l2=0.1)),
    ]
    for found, truth in pairs:
        assert found.is_cuda
        assert relative(found, truth) < 1e-9


def test_kernels_run_on_current_stream():
    z, x, y = torch.randn(1000, 100).cuda(), torch.randn(1000, 64).cuda(), torch.randint(0, 100, (1000,)).cuda()
    truth = native.norms(z, y, None, x, 1.0, 0.0, 4.0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = native.norms(z, y, None, x, 1.0, 0.0, 4.0)
    stream.synchronize()
    assert torch.equal(found, truth)
