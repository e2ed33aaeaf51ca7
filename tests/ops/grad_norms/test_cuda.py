"""grad_norms on a GPU, compared with float64 on the CPU."""

import itertools

import pytest
import torch
from torch import nn

import kdfast
from kdfast.ops import backends
from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.dispatch import METHODS, squared_norms
from kdfast.ops.grad_norms.factors import Convolution, Geometry, OuterProduct

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(params=["cuda", "reference"])
def backend(request):
    if not backends.is_available("grad_norms", "cuda", request.param):
        pytest.skip("the extension was built without CUDA")
    return request.param


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_match_float64_on_the_cpu(backend, method):
    grid = itertools.product((1, 3, 5), (1, 2), (0, 2), (1, 2), ((64, 80, 1), (12, 8, 4), (6, 12, 6)))
    for k, s, pad, d, (channels, outputs, groups) in grid:
        geometry = Geometry((k, k), (s, s), (d, d), (pad, pad, pad, pad), groups)
        x = torch.randn(3, channels, 11, 13)
        weight = torch.zeros(outputs, channels // groups, k, k)
        y = nn.functional.conv2d(x, weight, None, s, pad, d, groups)
        factors = Convolution(x, torch.randn_like(y), geometry)
        truth = reference.squared_norms(Convolution(factors.a.double(), factors.b.double(), geometry), "direct")
        found = squared_norms(Convolution(factors.a.cuda(), factors.b.cuda(), geometry), method, backend)
        torch.testing.assert_close(
            found.cpu().double(), truth, rtol=2e-5, atol=0, msg=lambda m, g=geometry: f"{g}: {m}"
        )


@pytest.mark.parametrize(("method", "t"), list(itertools.product(METHODS, (1, 2, 65, 300))))
def test_sequences_match_float64_on_the_cpu(backend, method, t):
    factors = OuterProduct(torch.randn(4, t, 70), torch.randn(4, t, 33))
    truth = reference.squared_norms(OuterProduct(factors.a.double(), factors.b.double()), "direct")
    found = squared_norms(OuterProduct(factors.a.cuda(), factors.b.cuda()), method, backend)
    torch.testing.assert_close(found.cpu().double(), truth, rtol=2e-5, atol=0)


def test_network_matches_float64_on_the_cpu(backend):
    assert torch.backends.cudnn.allow_tf32, "the default, with which convolutions would miss the tolerance"
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, groups=32),
        nn.Flatten(2), nn.Linear(25, 16), nn.Flatten(), nn.Linear(512, 10),
    )  # fmt: skip
    x, y = torch.randn(5, 3, 12, 12), torch.randint(0, 10, (5,))
    truth = kdfast.grad_norms(model.double(), x.double(), y)
    model = model.float().cuda()
    found = kdfast.grad_norms(model, x.cuda(), y.cuda(), backend=backend)
    torch.testing.assert_close(found.cpu().double(), truth, rtol=1e-4, atol=0)
    again = kdfast.grad_norms(model, x.cuda(), y.cuda(), backend=backend)
    torch.testing.assert_close(again, found, rtol=1e-5, atol=0)
