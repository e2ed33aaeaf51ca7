"""grad_norms on a GPU, compared with float64 on the CPU."""

import dataclasses
import itertools

import pytest
import torch
from torch import nn

import kdfast
from kdfast.ops import backends
from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.dispatch import METHODS, squared_norms, sums_of_squares, weighted_squared_norms
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


def check_elements(factors, shape, backend):
    """Compare norms in a metric and sums of squares with float64 on the CPU, and the bits of two calls."""
    weights = torch.rand(shape) + 0.01
    exact = dataclasses.replace(factors, a=factors.a.double(), b=factors.b.double())
    ours = dataclasses.replace(factors, a=factors.a.cuda(), b=factors.b.cuda())
    truth = reference.weighted_squared_norms(exact, weights.double())
    found = weighted_squared_norms(ours, weights.cuda(), backend)
    torch.testing.assert_close(found.cpu().double(), truth, rtol=2e-5, atol=0)
    truth = reference.sums_of_squares(exact, shape)
    sums = sums_of_squares(ours, shape, backend)
    torch.testing.assert_close(sums.cpu(), truth, rtol=1e-4, atol=2e-6 * float(truth.max()))
    if backend == "cuda":
        assert torch.equal(weighted_squared_norms(ours, weights.cuda(), backend), found)
        assert torch.equal(sums_of_squares(ours, shape, backend), sums)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("n", [3, 70])
def test_elements_of_convolutions_match_float64_on_the_cpu(backend, n, channels_last):
    memory = torch.channels_last if channels_last else torch.contiguous_format
    grid = itertools.product((1, 3), (1, 2), (1, 2), ((64, 80, 1), (12, 8, 4), (6, 12, 6)))
    for k, s, d, (channels, outputs, groups) in grid:
        geometry = Geometry((k, k), (s, s), (d, d), (1, 1, 1, 1), groups)
        x = torch.randn(n, channels, 11, 13).contiguous(memory_format=memory)
        y = nn.functional.conv2d(x, torch.zeros(outputs, channels // groups, k, k), None, s, 1, d, groups)
        factors = Convolution(x, torch.randn_like(y).contiguous(memory_format=memory), geometry)
        check_elements(factors, (outputs, channels // groups, k, k), backend)


@pytest.mark.parametrize("n", [4, 300])
def test_elements_of_large_weights_match_float64_on_the_cpu(backend, n):
    check_elements(OuterProduct(torch.randn(n, 3, 1000), torch.randn(n, 3, 2100)), (2100, 1000), backend)


def test_functionals_of_a_network_match_float64_on_the_cpu(backend):
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, groups=32),
        nn.Flatten(2), nn.Linear(25, 16), nn.Flatten(), nn.Linear(512, 10),
    ).double()  # fmt: skip
    x, y = torch.randn(5, 3, 12, 12), torch.randint(0, 10, (5,))
    metric = {name: torch.rand(p.shape, dtype=torch.float64) + 0.1 for name, p in model.named_parameters()}
    norms = kdfast.grad_norms(model, x.double(), y, metric=metric)
    fisher = kdfast.fisher_diagonal(model, [(x.double(), y)])
    model, x, y = model.float().cuda(), x.cuda(), y.cuda()
    metric = {name: f.float().cuda() for name, f in metric.items()}
    found = kdfast.grad_norms(model, x, y, metric=metric, backend=backend)
    torch.testing.assert_close(found.cpu().double(), norms, rtol=1e-4, atol=0)
    for name, f in kdfast.fisher_diagonal(model, [(x, y)], backend=backend).items():
        torch.testing.assert_close(f.cpu(), fisher[name], rtol=1e-3, atol=1e-4 * float(fisher[name].max()))


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
