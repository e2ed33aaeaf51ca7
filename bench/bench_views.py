"""Augmentation and normalization of a batch from a data set: kdfast's operator, and the ways to do without it.

Run `pytest bench/bench_views.py --benchmark-only [--device cuda]`; extra_info holds the images per second. The data set
has 50,000 images of 32x32 pixels, and every call takes other rows of it. A separate group measures the random draws for
one epoch of CIFAR.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdfast.data.views import Normalization, ViewSpec, draw_view_indices, view_table
from kdfast.ops.views import gather_views, gather_views_reference

NORM = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
AFFINE = NORM.affine()
SPEC = ViewSpec("shift", (32, 32), pad=4, flip=True)
VIEWS = {"pad": SPEC.pad, "flip": SPEC.flip}
IDS = np.arange(50_000)


def operator(images, rows, views, dtype):
    return gather_views(images, rows, views, AFFINE.to(images.device), **VIEWS, dtype=dtype)


def taken(images, rows, views, dtype):
    """Copy the batch out of the data set with NumPy, then apply the operator to the copy."""
    batch = torch.from_numpy(np.take(images.numpy(), rows.numpy(), axis=0))
    return gather_views(batch, None, views, AFFINE, **VIEWS, dtype=dtype)


def reference(images, rows, views, dtype):
    return gather_views_reference(images, rows, views, AFFINE.to(images.device), **VIEWS, dtype=dtype)


def sliced(images, rows, views, dtype):
    """Normalize and pad, then copy one slice per row shift and per column shift, then apply a masked flip."""
    padded = F.pad(images[rows].permute(0, 3, 1, 2), (4, 4, 4, 4)).to(dtype)
    mean, std = (images.new_tensor(v, dtype=dtype).view(3, 1, 1) * 255 for v in (NORM.mean, NORM.std))
    padded = (padded - mean) / std
    lines = padded.new_empty(len(rows), 3, 32, 40)
    out = padded.new_empty(len(rows), 3, 32, 32)
    for shift in range(9):
        chosen = views // 18 == shift
        lines[chosen] = padded[chosen, :, shift : shift + 32]
    for shift in range(9):
        chosen = views // 2 % 9 == shift
        out[chosen] = lines[chosen, :, :, shift : shift + 32]
    return torch.where((views % 2 == 1)[:, None, None, None], out.flip(3), out)


@pytest.fixture(scope="module")
def images(device):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (50_000, 32, 32, 3), dtype=torch.uint8, generator=generator).to(device)


@pytest.mark.parametrize("implementation", [operator, taken, reference, sliced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [128, 512])
def test_views_of_a_batch(benchmark, images, device, size, dtype, implementation):
    if device == "cuda" and implementation is taken:
        pytest.skip("the images are on the GPU")
    benchmark.group = f"views: {size} of 50,000 x 32x32 to {dtype}"
    generator = torch.Generator().manual_seed(1)
    views = torch.randint(0, SPEC.count, (size,), generator=generator).to(device)
    batches = torch.randperm(len(images), generator=generator).to(device).split(size)[:-1]
    rows = batches[0]
    exact = NORM.affine(torch.float64).to(device)
    expected = gather_views_reference(images, rows, views, exact, **VIEWS, dtype=torch.float64)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    result = implementation(images, rows, views, dtype).double()
    torch.testing.assert_close(result, expected, rtol=0, atol=tolerance)
    endless = itertools.cycle(batches)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    benchmark(lambda: (implementation(images, next(endless), views, dtype), wait()))
    benchmark.extra_info["images_per_s"] = size / benchmark.stats.stats.median


@pytest.mark.parametrize(
    ("draw", "limit"),
    [(lambda: draw_view_indices(0, 3, IDS, 162), 0.1), (lambda: view_table(SPEC, 0, IDS, 20), 0.2)],
    ids=["indices-of-162", "table-of-20"],
)
def test_draws_for_one_epoch(benchmark, draw, limit):
    benchmark.group = "views: draws for 50,000 samples"
    benchmark(draw)
    assert benchmark.stats.stats.min < limit
