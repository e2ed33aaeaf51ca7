"""Augmentation and normalization of a batch: kdfast's operator, its reference, and slicing in plain PyTorch.

Run `pytest bench/bench_views.py --benchmark-only`; extra_info holds the images per second. A separate group measures
the random draws for one epoch of CIFAR.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdfast.data.views import Normalization, ViewSpec, apply_views, draw_view_indices, view_table
from kdfast.ops.views import shift_views_reference

NORM = Normalization((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
SPEC = ViewSpec("shift", (32, 32), pad=4, flip=True)
IDS = np.arange(50_000)


def native(images, offsets, dtype):
    views = (offsets[:, 0] * 9 + offsets[:, 1]) * 2 + offsets[:, 2]
    return apply_views(images, views, SPEC, NORM, dtype=dtype)


def reference(images, offsets, dtype):
    return shift_views_reference(images, offsets, NORM.affine(), pad=4, dtype=dtype)


def sliced(images, offsets, dtype):
    """Normalize and pad, then copy one slice per row shift and per column shift, then apply a masked flip."""
    padded = F.pad(images.permute(0, 3, 1, 2), (4, 4, 4, 4)).to(dtype)
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) * 255 for v in (NORM.mean, NORM.std))
    padded = (padded - mean) / std
    rows = padded.new_empty(len(images), 3, 32, 40)
    out = padded.new_empty(len(images), 3, 32, 32)
    for shift in range(9):
        chosen = offsets[:, 0] == shift
        rows[chosen] = padded[chosen, :, shift : shift + 32]
    for shift in range(9):
        chosen = offsets[:, 1] == shift
        out[chosen] = rows[chosen, :, :, shift : shift + 32]
    return torch.where(offsets[:, 2].bool()[:, None, None, None], out.flip(3), out)


def batch(size):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 32, 32, 3), dtype=torch.uint8, generator=generator)
    offsets = torch.randint(0, 9, (size, 3), dtype=torch.int32, generator=generator)
    offsets[:, 2] %= 2
    return images, offsets


@pytest.mark.parametrize("implementation", [native, reference, sliced])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [128, 512])
def test_views_of_a_batch(benchmark, size, dtype, implementation):
    benchmark.group = f"views: {size} x 32x32 to {dtype}"
    images, offsets = batch(size)
    expected = shift_views_reference(images, offsets, NORM.affine(torch.float64), pad=4, dtype=torch.float64)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(implementation(images, offsets, dtype).double(), expected, rtol=0, atol=tolerance)
    benchmark(implementation, images, offsets, dtype)
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
