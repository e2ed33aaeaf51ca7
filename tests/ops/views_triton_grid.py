"""Run the Triton kernels of views in Triton's interpreter; print the cases that differ, by group, as JSON.

Run by test_views_triton.py in a process of its own, because TRITON_INTERPRET must be set before Triton is imported.
"""

import itertools
import json
import sys
from pathlib import Path

import torch

from kdfast.ops.views import (
    crop_views,
    crop_views_reference,
    crops_triton,
    gather_triton,
    gather_views,
    gather_views_reference,
)

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


def expected(tensors, options, dtype, reference=gather_views_reference):
    """What the reference computes; bfloat16 is truncated, as the interpreter does instead of rounding."""
    if dtype != torch.bfloat16:
        return reference(*tensors, **options, dtype=dtype)
    bits = reference(*tensors, **options).view(torch.int32)
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
        out = gather_triton.gather_views(images, rows, view_ids, affine, 4, flip, torch.float32)
        nan = out.isnan().flatten(1)
        good = gather_views_reference(images, rows[8:], view_ids[8:], affine, pad=4, flip=flip)
        yield bool(nan[:8].all()) and torch.equal(out[8:], good), flip


def crop_case(samples, side, size):
    """Images, boxes and affine; the options of `crop_views`. The first box is the whole image."""
    generator = torch.Generator().manual_seed(sum(side) + sum(size))
    images = torch.randint(0, 256, (4, *side, 3), dtype=torch.uint8, generator=generator)
    corners = [torch.randint(0, s, (samples, 2), generator=generator).sort(1).values for s in side]
    (top, low), (left, right) = (x.unbind(1) for x in corners)
    boxes = torch.stack([top, left, low - top + 1, right - left + 1, torch.arange(samples) % 2], 1).int()
    boxes[0] = torch.tensor([0, 0, *side, 0])
    rows = torch.randint(0, 4, (samples,), generator=generator)
    return (images, boxes, torch.randn(2, 3, generator=generator)), {"size": size, "rows": rows}


def crops():
    # Results of several tiles; reduced, unchanged, one pixel, and reduced to one pixel.
    sides = [((9, 8), (20, 13)), ((30, 23), (7, 5)), ((8, 8), (8, 8)), ((1, 1), (3, 2)), ((4, 7), (1, 1))]
    cases = [(*sides[0], dtype) for dtype in DTYPES] + [(*case, torch.float32) for case in sides[1:]]
    for side, size, dtype in cases:
        tensors, options = crop_case(4, side, size)
        out = crop_views(*tensors, **options, dtype=dtype, backend="triton")
        right = torch.equal(out, expected(tensors, options, dtype, crop_views_reference)) and out.dtype == dtype
        yield right and out.is_contiguous(memory_format=torch.channels_last), (side, size, str(dtype))
    (images, boxes, affine), options = crop_case(4, (9, 8), (6, 6))
    out = crop_views(images, boxes, affine, size=(6, 6), backend="triton")
    yield torch.equal(out, crop_views_reference(images, boxes, affine, size=(6, 6))), "no rows"
    yield crop_views(images[:0], boxes[:0], affine, size=(6, 6), backend="triton").shape == (0, 3, 6, 6), "empty"


def bad_crops():
    (images, boxes, affine), _ = crop_case(9, (9, 8), (6, 5))
    bad = [
        (-1, 0, 2, 2, 0),
        (0, 0, 10, 2, 0),
        (0, 7, 2, 2, 0),
        (0, 0, 0, 2, 0),
        (0, 0, 2, 2, 2),
        (2**31 - 1, 0, 2, 2, 0),
    ]
    boxes[: len(bad)] = torch.tensor(bad)
    rows = torch.tensor([0, 1, 2, 3, 0, 1, -1, 2**40, 2])
    out = crops_triton.crop_views(images, rows, boxes, affine, (6, 5), torch.float32)
    good = crop_views_reference(images, boxes[8:], affine, size=(6, 5), rows=rows[8:])
    yield bool(out[:8].isnan().all()) and torch.equal(out[8:], good), "bad boxes and rows"


def report(cases):
    results = list(cases)
    return len(results), [name for right, name in results if not right]


if __name__ == "__main__":
    groups = {"sizes": sizes, "rows": rows, "out of range": out_of_range, "crops": crops, "bad crops": bad_crops}
    print(json.dumps({name: report(group()) for name, group in groups.items()}))
