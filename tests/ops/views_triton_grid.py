"""Run the Triton kernel of `gather_views` in Triton's interpreter; print the cases that differ, by group, as JSON.

Run by test_views_triton.py in a process of its own, because TRITON_INTERPRET must be set before Triton is imported.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

from kdfast.ops import views_triton
from kdfast.ops.views import gather_views, gather_views_reference

sys.path.append(str(Path(__file__).parents[1]))
import triton_interpreter  # noqa: F401  (corrects the interpreter)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Width times 3 is below, at, between and above multiples of a tile; the window lies partly or wholly outside.
SIZES = [(1, 1, 0), (8, 8, 1), (5, 7, 9), (32, 32, 4), (33, 43, 4)]


def make_case(samples, height, width, pad, flip):
    generator = torch.Generator().manual_seed(height * width + pad)
    images = torch.randint(0, 256, (4, height, width, 3), dtype=torch.uint8, generator=generator)
    rows = torch.randint(0, 4, (samples,), generator=generator)
    view_ids = torch.randint(0, (2 * pad + 1) ** 2 * (1 + flip), (samples,), generator=generator)
    return images, rows, view_ids, torch.randn(2, 3, generator=generator)


def expected(tensors, options, dtype):
    """What the reference computes; bfloat16 is truncated, as the interpreter does instead of rounding."""
    if dtype != torch.bfloat16:
        return gather_views_reference(*tensors, **options, dtype=dtype)
    bits = gather_views_reference(*tensors, **options).view(torch.int32)
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def sizes():
    for (height, width, pad), flip, dtype in itertools.product(SIZES, (True, False), DTYPES):
        tensors, options = make_case(4, height, width, pad, flip), {"pad": pad, "flip": flip}
        out = gather_views(*tensors, **options, dtype=dtype, backend="triton")
        right = torch.equal(out, expected(tensors, options, dtype)) and out.dtype == dtype
        yield right and out.is_contiguous(memory_format=torch.channels_last), (height, width, pad, flip, str(dtype))


def rows():
    options = {"pad": 2, "flip": True}
    images, _, view_ids, affine = make_case(4, 9, 8, 2, True)
    out = gather_views(images, None, view_ids, affine, **options, backend="triton")
    yield torch.equal(out, gather_views_reference(images, None, view_ids, affine, **options)), "none"
    none = torch.zeros(0, dtype=torch.int64)
    yield gather_views(images, none, none, affine, **options, backend="triton").shape == (0, 3, 9, 8), "empty"
    images, some, view_ids, affine = make_case(6, 9, 8, 2, True)
    strided = images.transpose(1, 2), some[::2], view_ids[::2], affine.t().contiguous().t()
    out = gather_views(*strided, **options, backend="triton")
    yield torch.equal(out, gather_views_reference(*strided, **options)), "strided"


def out_of_range():
    for flip, views in ((True, 162), (False, 81)):
        images, rows, view_ids, affine = make_case(9, 8, 8, 4, flip)
        for i, bad in enumerate((-1, 4, 2**40, -(2**40))):
            rows[i] = bad
        view_ids[4:8] = torch.tensor([-1, views, 2**32, -(2**40)])
        out = views_triton.gather_views(images, rows, view_ids, affine, 4, flip, torch.float32)
        nan = out.isnan().flatten(1)
        good = gather_views_reference(images, rows[8:], view_ids[8:], affine, pad=4, flip=flip)
        yield bool(nan[:8].all()) and torch.equal(out[8:], good), flip


def report(cases):
    results = list(cases)
    return len(results), [name for right, name in results if not right]


if __name__ == "__main__":
    groups = {"sizes": sizes, "rows": rows, "out of range": out_of_range}
    print(json.dumps({name: report(group()) for name, group in groups.items()}))
