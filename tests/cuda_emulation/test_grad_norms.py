"""The CUDA kernels of grad_norms, run on a CPU, against gradients formed in float64."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

DIRECT, GRAM, DEPTHWISE = 0, 1, 2
TOLERANCE = 2e-5  # relative, of a squared norm
SEEDS = (0, 1, 2)  # of the order of the threads


def true_gradients(a, b, kernel, stride, dilation, pads, groups):
    """Form the gradients by autograd in float64, one sample at a time."""
    top, bottom, left, right = pads
    a = F.pad(a.double(), (left, right, top, bottom))
    out = []
    for x, grad in zip(a, b.double(), strict=True):
        w = torch.zeros(len(grad), len(x) // groups, *kernel, dtype=torch.float64, requires_grad=True)
        y = F.conv2d(x.unsqueeze(0), w, stride=stride, dilation=dilation, groups=groups)
        out.append(torch.autograd.grad(y, w, grad.unsqueeze(0))[0])
    return torch.stack(out)


class Case:
    """A convolution with random operands, and what the kernels make of it."""

    def __init__(self, size, channels, outputs, kernel=(3, 3), stride=(1, 1), dilation=(1, 1), pads=(0, 0, 0, 0),
                 groups=1, batch=2, channels_last=False):  # fmt: skip
        self.geometry = kernel, stride, dilation, pads, groups
        high, wide = (
            (n + sum(pads[2 * i : 2 * i + 2]) - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
            for i, n in enumerate(size)
        )
        self.empty = high < 1 or wide < 1
        if self.empty:
            return
        memory = torch.channels_last if channels_last else torch.contiguous_format
        self.a = torch.randn(batch, channels, *size).contiguous(memory_format=memory)
        self.b = torch.randn(batch, outputs, high, wide).contiguous(memory_format=memory)

    def gradients(self):
        return true_gradients(self.a, self.b, *self.geometry)

    def request(self, algorithm, seed, name="squared_norms", weights=None):
        a, b, (kernel, stride, dilation, pads, groups) = self.a, self.b, self.geometry
        sizes = (*a.shape, *b.shape[1:], *kernel, *stride, *dilation, pads[0], pads[2], groups, algorithm)
        integers = (*a.stride(), *b.stride(), *sizes)
        return {"name": name, "integers": integers, "arrays": (a, b, weights), "seed": seed}


def check(emulate, cases, algorithm, seeds=SEEDS):
    """Compare with the truth, and the bits with those of other orders of the threads."""
    cases = [case for case in cases if not case.empty]
    assert cases
    outputs = iter(emulate([case.request(algorithm, seed) for case in cases for seed in seeds]))
    for case in cases:
        found, *others = (np.frombuffer(next(outputs)[0]).reshape(len(case.a), -1) for _ in seeds)
        expected = case.gradients().square().flatten(1).sum(1).numpy()
        np.testing.assert_allclose(found.sum(1), expected, rtol=TOLERANCE, err_msg=str(case.geometry))
        for other in others:
            np.testing.assert_array_equal(other, found, err_msg=str(case.geometry))


def check_elements(emulate, cases, algorithm, seeds=SEEDS):
    """Compare norms in a metric and sums of squares with the truth, and the bits with those of other orders."""
    cases = [case for case in cases if not case.empty]
    assert cases
    squares = [case.gradients().square() for case in cases]
    weights = [torch.rand(s.shape[1:]) + 0.01 for s in squares]
    requests = []
    for case, w in zip(cases, weights, strict=True):
        requests += [case.request(algorithm, seed, weights=w) for seed in seeds]
        requests += [case.request(algorithm, seed, "sums_of_squares") for seed in seeds]
    outputs = iter(emulate(requests))
    for case, truth, w in zip(cases, squares, weights, strict=True):
        norms, *others = (np.frombuffer(next(outputs)[0]).reshape(len(case.a), -1) for _ in seeds)
        expected = (truth * w).flatten(1).sum(1).numpy()
        np.testing.assert_allclose(norms.sum(1), expected, rtol=TOLERANCE, err_msg=str(case.geometry))
        for other in others:
            np.testing.assert_array_equal(other, norms, err_msg=str(case.geometry))
        sums, *others = (np.frombuffer(next(outputs)[0]).reshape(-1, *w.shape) for _ in seeds)
        # Part i has the samples i, i + parts, and so on: blocks that shared a part would race.
        expected = torch.stack([truth[i :: len(sums)].sum(0) for i in range(len(sums))]).numpy()
        # Where an element nearly cancels, its error is relative to its terms.
        np.testing.assert_allclose(sums, expected, rtol=1e-4, atol=2e-6 * expected.max(), err_msg=str(case.geometry))
        for other in others:
            np.testing.assert_array_equal(other, sums, err_msg=str(case.geometry))


def square(k, s, d, p):
    return {"kernel": (k, k), "stride": (s, s), "dilation": (d, d), "pads": (p,) * 4}


GRID = list(itertools.product((1, 3, 5), (1, 2), (1, 2), (0, 2)))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("algorithm", [DIRECT, GRAM])
def test_geometries(emulate, algorithm, channels_last):
    for groups in (1, 4):
        cases = [
            Case((7, 9), 12, 8, **square(*sizes), groups=groups, batch=1, channels_last=channels_last) for sizes in GRID
        ]
        check(emulate, cases, algorithm, seeds=(0, 1))


@pytest.mark.parametrize("channels_last", [False, True])
def test_elements_of_geometries(emulate, channels_last):
    for groups in (1, 4):
        cases = [
            Case((7, 9), 12, 8, **square(*sizes), groups=groups, batch=2, channels_last=channels_last)
            for sizes in GRID[::2]
        ]
        check_elements(emulate, cases, DIRECT, seeds=(0, 1))


def test_wide_layers_and_odd_sizes(emulate):
    rng = random.Random(0)
    for algorithm in (DIRECT, GRAM):
        check(emulate, [random_case(rng) for _ in range(12)], algorithm)
    check_elements(emulate, [random_case(rng, batch=2) for _ in range(8)], DIRECT, seeds=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_wide_layers_and_odd_sizes(emulate, seed):
    rng = random.Random(seed)
    for algorithm in (DIRECT, GRAM):
        check(emulate, [random_case(rng) for _ in range(40)], algorithm, seeds=range(2))
    check_elements(emulate, [random_case(rng, batch=rng.choice((1, 3))) for _ in range(30)], DIRECT, seeds=range(2))


def random_case(rng, batch=1):
    def pair(values):
        return rng.choice(values), rng.choice(values)

    groups = rng.choice((1, 1, 3))
    return Case(
        (rng.choice((6, 13, 20)), rng.choice((7, 16, 30))),
        groups * rng.choice((1, 5, 17, 40)),
        groups * rng.choice((1, 7, 17, 33, 70)),
        pair((1, 2, 3, 4)),
        pair((1, 2, 3)),
        pair((1, 2)),
        (*pair((0, 1, 3)), *pair((0, 1, 2))),
        groups,
        batch=batch,
        channels_last=rng.random() < 0.5,
    )


# More than one sum of 32 stages of 16 terms, and depths that are no multiple of a stage.
@pytest.mark.parametrize("channels_last", [False, True])
def test_deep_sums(emulate, channels_last):
    more = {"batch": 1, "channels_last": channels_last}
    wide = Case((25, 49), 3, 5, pads=(1,) * 4, **more)  # 1225 positions
    inputs = Case((4, 5), 70, 7, pads=(1,) * 4, **more)  # 630 inputs
    outputs = Case((3, 4), 7, 530, kernel=(1, 1), **more)
    check(emulate, [wide], DIRECT)
    check(emulate, [inputs, outputs], GRAM)
    check_elements(emulate, [wide], DIRECT)


# Blocks take one or several samples, and add one or several squares before they move to float64.
@pytest.mark.parametrize("batch", [1, 4, 5, 9])
def test_elements_of_more_samples_than_blocks(emulate, batch):
    one = Case((4, 5), 3, 9, batch=batch)
    tiles = Case((1, 3), 40, 70, kernel=(1, 2), groups=2, batch=batch)
    check_elements(emulate, [one, tiles], DIRECT, seeds=(0, 1))


@pytest.mark.parametrize("algorithm", [DIRECT, GRAM])
def test_sequences(emulate, algorithm):
    check(emulate, [Case((1, t), 9, 20, kernel=(1, 1), channels_last=True) for t in (1, 2, 17, 130)], algorithm)


@pytest.mark.parametrize(("stride", "multiplier", "kernel"), list(itertools.product((1, 2), (1, 2), (1, 3))))
def test_depthwise(emulate, stride, multiplier, kernel):
    sizes = square(kernel, stride, 1, kernel // 2)
    check(emulate, [Case((13, 29), 5, 5 * multiplier, **sizes, groups=5, batch=3)], DEPTHWISE)


@pytest.mark.parametrize("multiplier", [1, 2])
def test_elements_of_depthwise_convolutions(emulate, multiplier):
    one = Case((20, 19), 2, 2 * multiplier, **square(3, 2, 1, 1), groups=2, batch=3)
    other = Case((5, 6), 2, 2 * multiplier, kernel=(2, 3), groups=2, batch=2, channels_last=True)
    check_elements(emulate, [one, other], DEPTHWISE, seeds=(0, 1))


@pytest.mark.parametrize("algorithm", [DIRECT, GRAM])
def test_strides(emulate, algorithm):
    case = Case((7, 9), 6, 4, batch=3)
    case.a = torch.randn(7, 3, 18, 6).permute(1, 3, 0, 2)[..., ::2]
    case.b = torch.randn(1, 4, 5, 1).expand(3, 4, 5, 7)
    check(emulate, [case], algorithm)
    if algorithm == DIRECT:
        check_elements(emulate, [case], algorithm)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [(2, 2**29, "span more than 4 GiB"), (6, 2**31, "span more than 4 GiB"), (21, 2**28, "too high or too wide")],
    ids=["input_rows", "gradient_rows", "pad"],
)
def test_rejects_sizes_beyond_32_bits(emulate, place, value, message):
    request = Case((4, 4), 2, 2, batch=1).request(DIRECT, seed=0)
    integers = list(request["integers"])
    integers[place] = value
    with pytest.raises(AssertionError, match=message):
        emulate([{**request, "integers": integers}])
