"""The algorithms for the norms of one layer, compared with gradients formed in float64."""

import itertools
import random

import pytest
import torch
import torch.nn.functional as F

from kdfast.ops import backends
from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.dispatch import (
    METHODS,
    estimate_costs,
    select_algorithm,
    squared_norms,
    sums_of_squares,
    weighted_squared_norms,
)
from kdfast.ops.grad_norms.factors import Convolution, Geometry, OuterProduct, Sizes

TOLERANCE = 1e-5  # relative, of a squared norm


def gradients(factors):
    """Form the gradients `(N, *shape)` by autograd in float64, one sample at a time."""
    if isinstance(factors, OuterProduct):
        return torch.bmm(factors.b.double().transpose(1, 2), factors.a.double())
    g = factors.geometry
    top, bottom, left, right = g.pads
    a = F.pad(factors.a.double(), (left, right, top, bottom))
    shape = (factors.b.shape[1], a.shape[1] // g.groups, *g.kernel)
    out = []
    for x, grad in zip(a, factors.b.double(), strict=True):
        w = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        y = F.conv2d(x.unsqueeze(0), w, stride=g.stride, dilation=g.dilation, groups=g.groups)
        out.append(torch.autograd.grad(y, w, grad.unsqueeze(0))[0])
    return torch.stack(out)


def truth(factors):
    return gradients(factors).flatten(1).square().sum(1)


def convolution(channels, outputs, size, geometry, n=3, dtype=torch.float32, channels_last=False):
    a = torch.randn(n, channels, *size, dtype=dtype)
    (kh, kw), stride, dilation, (top, bottom, left, right), _ = geometry
    high = (size[0] + top + bottom - dilation[0] * (kh - 1) - 1) // stride[0] + 1
    wide = (size[1] + left + right - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    b = torch.randn(n, outputs, high, wide, dtype=dtype)
    memory = torch.channels_last if channels_last else torch.contiguous_format
    return Convolution(a.contiguous(memory_format=memory), b.contiguous(memory_format=memory), geometry)


def error(found, factors):
    expected = truth(factors)
    assert found.shape == expected.shape
    return ((found.double() - expected).abs() / expected).max().item()


GRID = [
    Geometry((k, k), (s, s), (d, d), (p, p, p, p), g)
    for k, s, p, d, g in itertools.product((1, 3, 5), (1, 2), (0, 1, 2), (1, 2), (1, 4))
]


@pytest.mark.parametrize("method", METHODS)
def test_convolutions_of_the_grid(grad_norms_backend, method):
    for i, geometry in enumerate(GRID):
        factors = convolution(8, 12, (11, 13), geometry, channels_last=i % 2 == 1)
        assert error(squared_norms(factors, method, grad_norms_backend), factors) < TOLERANCE, geometry


@pytest.mark.parametrize("method", METHODS)
def test_wide_layers_and_odd_sizes(grad_norms_backend, method):
    rng = random.Random(0)
    for _ in range(25):
        pair = lambda values: (rng.choice(values), rng.choice(values))  # noqa: E731
        geometry = Geometry(
            pair((1, 2, 3, 4)),
            pair((1, 2, 3)),
            pair((1, 2)),
            (*pair((0, 1, 3)), *pair((0, 1, 2))),
            rng.choice((1, 3)),
        )
        factors = convolution(
            geometry.groups * rng.choice((1, 5, 17, 33, 60)), geometry.groups * rng.choice((1, 7, 8, 20)),
            (rng.choice((8, 20)), rng.choice((9, 16, 40))), geometry, channels_last=rng.random() < 0.5,
        )  # fmt: skip
        assert error(squared_norms(factors, method, grad_norms_backend), factors) < TOLERANCE, geometry


@pytest.mark.parametrize(("stride", "multiplier", "kernel"), list(itertools.product((1, 2), (1, 2), (1, 3, 5))))
def test_depthwise_convolutions(grad_norms_backend, stride, multiplier, kernel):
    pad = kernel // 2
    geometry = Geometry((kernel, kernel), (stride, stride), (1, 1), (pad,) * 4, 6)
    factors = convolution(6, 6 * multiplier, (9, 17), geometry)
    assert error(squared_norms(factors, backend=grad_norms_backend), factors) < TOLERANCE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("t", "d", "p"), [(1, 5, 3), (2, 100, 70), (37, 20, 9), (300, 8, 49), (600, 3, 2)])
def test_sequences(grad_norms_backend, method, t, d, p):
    factors = OuterProduct(torch.randn(4, t, d), torch.randn(4, t, p))
    assert error(squared_norms(factors, method, grad_norms_backend), factors) < TOLERANCE


def check_elements(factors, backend, tolerance=TOLERANCE):
    """Compare sums of weighted squares and sums of squares over the samples with the gradients."""
    grads = gradients(factors)
    weights = 10 ** torch.rand(grads.shape[1:], dtype=factors.b.dtype).mul(4).sub(2)
    found = weighted_squared_norms(factors, weights, backend)
    expected = (grads.square() * weights).flatten(1).sum(1)
    assert ((found - expected).abs() / expected).max() < tolerance, factors
    found, expected = sums_of_squares(factors, grads.shape[1:], backend), grads.square().sum(0)
    assert found.shape == expected.shape
    assert found.dtype == torch.float64
    # Relative to the mean: an element of G may nearly cancel in each sample.
    assert ((found - expected).abs() / (expected + expected.mean())).max() < tolerance, factors


def test_elements_of_convolutions_of_the_grid(grad_norms_backend):
    for i, geometry in enumerate(GRID):
        check_elements(convolution(8, 12, (11, 13), geometry, channels_last=i % 2 == 1), grad_norms_backend)


def test_elements_of_wide_layers_and_odd_sizes(grad_norms_backend):
    rng = random.Random(1)
    for _ in range(25):
        pair = lambda values: (rng.choice(values), rng.choice(values))  # noqa: E731
        kernel, strides, dilation = pair((1, 2, 3, 4)), pair((1, 2, 3)), pair((1, 2))
        groups = rng.choice((1, 3))
        geometry = Geometry(kernel, strides, dilation, (*pair((0, 1, 3)), *pair((0, 1, 2))), groups)
        factors = convolution(
            groups * rng.choice((1, 5, 17, 33, 60, 100)), groups * rng.choice((1, 7, 8, 20, 90)),
            (rng.choice((8, 20)), rng.choice((9, 16, 40))), geometry, channels_last=rng.random() < 0.5,
        )  # fmt: skip
        check_elements(factors, grad_norms_backend)


@pytest.mark.parametrize(("stride", "multiplier", "kernel"), list(itertools.product((1, 2), (1, 2), (1, 3, 5))))
def test_elements_of_depthwise_convolutions(grad_norms_backend, stride, multiplier, kernel):
    geometry = Geometry((kernel, kernel), (stride, stride), (1, 1), (kernel // 2,) * 4, 6)
    check_elements(convolution(6, 6 * multiplier, (9, 17), geometry), grad_norms_backend)


@pytest.mark.parametrize(("t", "d", "p"), [(1, 5, 3), (2, 100, 70), (37, 20, 9), (300, 8, 49), (600, 3, 2)])
def test_elements_of_sequences(grad_norms_backend, t, d, p):
    check_elements(OuterProduct(torch.randn(4, t, d), torch.randn(4, t, p)), grad_norms_backend)


def test_elements_of_more_samples_than_are_packed_together(grad_norms_backend):
    check_elements(convolution(3, 5, (6, 6), Geometry((3, 3), (1, 1), (1, 1), (1,) * 4, 1), n=70), grad_norms_backend)


def test_weighted_norms_of_large_weights_do_not_lose_digits(grad_norms_backend):
    factors, weights = OuterProduct(torch.randn(2, 2, 1000), torch.randn(2, 2, 1500)), torch.rand(1500, 1000)
    expected = (gradients(factors).square() * weights).flatten(1).sum(1)
    found = weighted_squared_norms(factors, weights, grad_norms_backend)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=0)


def test_elements_are_exact_in_float64():
    for geometry in GRID[::5]:
        check_elements(convolution(8, 12, (11, 13), geometry, dtype=torch.float64), "reference", 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_reference_is_exact_in_float64(method):
    for geometry in GRID[::5]:
        factors = convolution(8, 12, (11, 13), geometry, dtype=torch.float64)
        assert error(squared_norms(factors, method, "reference"), factors) < 1e-12


def test_result_does_not_depend_on_the_chunk_size(monkeypatch):
    cases = [convolution(8, 12, (11, 13), GRID[30], n=7), OuterProduct(torch.randn(7, 20, 30), torch.randn(7, 20, 10))]
    for factors, method in itertools.product(cases, METHODS):
        whole = squared_norms(factors, method, "reference")
        monkeypatch.setattr(reference, "CHUNK_BYTES", 1)
        torch.testing.assert_close(squared_norms(factors, method, "reference"), whole, rtol=1e-5, atol=0)
        monkeypatch.undo()


@pytest.mark.skipif(not backends.is_available("grad_norms", "cpu", "native"), reason="needs the compiled extension")
def test_instruction_sets_with_fma_give_the_same_bits():
    from kdfast.ops.grad_norms import native

    if native.extension.isa() == "default":
        pytest.skip("this processor has no fused multiply-add")
    factors = convolution(33, 20, (11, 13), Geometry((3, 3), (1, 1), (1, 1), (1,) * 4, 1))
    deep = convolution(20, 20, (11, 13), Geometry((3, 3), (2, 2), (1, 1), (1,) * 4, 20))
    calls = [(factors, native.DIRECT), (factors, native.GRAM), (deep, native.DEPTHWISE)]
    for x, algorithm in calls:
        results = [native.conv_squared_norms(x.a, x.b, x.geometry, algorithm, isa_limit=level) for level in (0, 1, 2)]
        assert torch.equal(results[1], results[2])
        torch.testing.assert_close(results[0], results[2], rtol=1e-5, atol=0)
    for x, algorithm in (calls[0], calls[2]):
        shape = (x.b.shape[1], x.a.shape[1] // x.geometry.groups, *x.geometry.kernel)
        weights = torch.rand(shape)
        for results in (
            [native.conv_squared_norms(x.a, x.b, x.geometry, algorithm, level, weights) for level in (0, 1, 2)],
            [native.conv_sums_of_squares(x.a, x.b, x.geometry, algorithm, level) for level in (0, 1, 2)],
        ):
            assert torch.equal(results[1], results[2])
            torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not backends.is_available("grad_norms", "cpu", "native"), reason="needs the compiled extension")
def test_thread_count_does_not_change_the_bits():
    from kdfast.ops.grad_norms import native

    factors = convolution(33, 20, (11, 13), GRID[30]._replace(groups=1), n=9)
    deep = convolution(20, 20, (11, 13), Geometry((3, 3), (2, 2), (1, 1), (1,) * 4, 20), n=9)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(
                [native.conv_squared_norms(factors.a, factors.b, factors.geometry, algorithm) for algorithm in (0, 1)]
            )
            for x, algorithm in ((factors, native.DIRECT), (deep, native.DEPTHWISE)):
                shape = (x.b.shape[1], x.a.shape[1] // x.geometry.groups, *x.geometry.kernel)
                weights = torch.arange(1.0, 1 + torch.Size(shape).numel())
                found[-1].append(native.conv_squared_norms(x.a, x.b, x.geometry, algorithm, weights=weights))
                found[-1].append(native.conv_sums_of_squares(x.a, x.b, x.geometry, algorithm))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.skipif(not backends.is_available("grad_norms", "cpu", "native"), reason="needs the compiled extension")
def test_rejects_inconsistent_sizes():
    from kdfast.ops.grad_norms import native

    factors = convolution(6, 6, (9, 9), Geometry((3, 3), (1, 1), (1, 1), (1,) * 4, 1))
    with pytest.raises(ValueError, match="one channel per group"):
        native.conv_squared_norms(factors.a, factors.b, factors.geometry, native.DEPTHWISE)
    with pytest.raises(ValueError, match="groups must divide"):
        native.conv_squared_norms(factors.a, factors.b, factors.geometry._replace(groups=4), native.DIRECT)
    with pytest.raises(ValueError, match="positive"):
        native.conv_squared_norms(factors.a, factors.b, factors.geometry._replace(stride=(0, 1)), native.DIRECT)
    with pytest.raises(ValueError, match="weights and squares need the direct or the depthwise algorithm"):
        native.conv_sums_of_squares(factors.a, factors.b, factors.geometry, native.GRAM)


def test_auto_selects_the_cheapest_algorithm():
    assert select_algorithm(Sizes(16, 4608, 512, 9)) == "pixel"  # last stage of a ResNet: few positions
    assert select_algorithm(Sizes(1024, 576, 64, 9)) == "direct"  # first stage of a ResNet: many positions
    assert select_algorithm(Sizes(196, 768, 768, 256, 256)) == "gram"  # patches that do not overlap
    assert select_algorithm(Sizes(128, 768, 768)) == "gram"  # a sequence
    assert select_algorithm(Sizes(1024, 9, 1, 9)) == "direct"  # depthwise
    for method in METHODS[1:]:
        assert select_algorithm(Sizes(16, 4608, 512, 9), method) == method
        assert estimate_costs(Sizes(16, 4608, 512, 9))[method] >= estimate_costs(Sizes(16, 4608, 512, 9))["pixel"]
