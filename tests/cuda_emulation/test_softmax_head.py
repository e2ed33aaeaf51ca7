"""The CUDA kernels of the softmax head, run on a CPU, against the reference in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from kdfast.ops.softmax_head import curvature
from kdfast.ops.softmax_head.residuals import LossConfig, reference_residuals

LOSSES = [LossConfig(0.0), LossConfig(0.3, 4.0), LossConfig(1.0, 2.0)]
DTYPES = [torch.float32, torch.float64]
CLASSES = [1, 2, 10, 33, 300]
SEEDS = (0, 1)  # of the order of the threads
ROWS = 3


def draw(dtype, *shape, scale=1.0, gap=0):
    """Draw a matrix with `gap` unused elements between its rows."""
    return (torch.randn(*shape[:-1], shape[-1] + gap, dtype=torch.float64) * scale).to(dtype)[..., : shape[-1]]


def run(emulate, dtype, shapes, **request):
    """Return the outputs of a kernel, and verify that all orders of the threads give the same bits."""
    runs = emulate([{**request, "seed": seed, "outputs": len(shapes)} for seed in SEEDS])
    assert all(output == runs[0] for output in runs)
    return [torch.frombuffer(bytearray(x), dtype=dtype).reshape(s) for x, s in zip(runs[0], shapes, strict=True)]


def error(found, exact):
    return float((found.double() - exact).norm()), float(exact.norm())


def logits_fields(z, loss):
    return (*z.shape, z.stride(0), z.dtype == torch.float64), (loss.alpha, loss.temperature)


def check_residuals(emulate, dtype, classes, loss, width):
    z, t = draw(dtype, ROWS, classes, scale=3, gap=2), draw(dtype, ROWS, classes, gap=1)
    x, y = draw(dtype, ROWS, width, gap=3), torch.randint(0, classes, (ROWS,))
    sizes, config = logits_fields(z, loss)
    empty = [torch.full((size,), torch.nan, dtype=dtype) for size in (ROWS * classes, ROWS)]
    operands = (z, y if loss.alpha < 1 else None, t if loss.alpha > 0 else None, x if width else None)
    r, norms = run(
        emulate, dtype, [(ROWS, classes), (ROWS,)], name="residuals",
        integers=(*sizes, t.stride(0), width, x.stride(0)), reals=(*config, 1.0), arrays=(*operands, *empty),
    )  # fmt: skip
    exact = reference_residuals(z.double(), y, t.double(), loss)
    lengths = (x.double().square().sum(1) + 1).sqrt() if width else 1.0
    for found, expected in ((r, exact), (norms, exact.norm(dim=1) * lengths)):
        distance, size = error(found, expected)
        assert distance <= 100 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_residuals(emulate, classes, dtype):
    for loss, width in itertools.product(LOSSES, (0, 70)):
        check_residuals(emulate, dtype, classes, loss, width)


def test_residuals_of_wide_features(emulate):
    check_residuals(emulate, torch.float32, 10, LOSSES[0], 5000)


def check_curvature(emulate, dtype, classes, loss, vectors, ties=False):
    z = draw(dtype, ROWS, classes, scale=3, gap=2)
    if ties:
        z.round_()
    a = draw(dtype, ROWS, vectors, classes)
    sizes, config = logits_fields(z, loss)
    (found,) = run(
        emulate, dtype, [a.shape], name="curvature", integers=(*sizes, vectors), reals=config, arrays=(z, a)
    )  # fmt: skip
    exact = curvature.reference_curvature_(a.double(), curvature.curvature_terms(z.double(), loss))
    distance, size = error(found, exact)
    assert distance <= 100 * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", CLASSES)
def test_curvature(emulate, classes, dtype):
    for loss, vectors in itertools.product(LOSSES, (1, 3, 11)):
        check_curvature(emulate, dtype, classes, loss, vectors, ties=vectors == 3)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [3, 31, 32, 64, 100, 257, 1000, 2049])
def test_many_sizes(emulate, classes, dtype):
    for alpha, temperature in itertools.product((0.0, 0.1, 0.9, 1.0), (1.0, 4.0, 20.0)):
        loss = LossConfig(alpha, temperature)
        for width in (0, 1, 33, 512):
            check_residuals(emulate, dtype, classes, loss, width)
        for vectors in (1, 2, 8, 9, 40):
            check_curvature(emulate, dtype, classes, loss, vectors, ties=vectors == 9)
