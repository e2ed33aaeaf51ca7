"""Cropped views: Pillow's pixels, backends, bit equality, dtypes and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from kdfast.errors import BackendUnavailable, DataError, ShapeError
from kdfast.ops import native
from kdfast.ops.backends import TABLE
from kdfast.ops.views import crop_views, crop_views_reference
from kdfast.ops.views.crops import _taps

CPU, GPU = TABLE["views", "cpu"], TABLE["views", "cuda"]
UNSCALED = torch.tensor([[1.0] * 3, [0.0] * 3])
# Enlarged, reduced, both, unchanged, to or from a single pixel, and odd sides.
SIZES = [((32, 32), (48, 40)), ((50, 60), (16, 9)), ((40, 12), (20, 24)), ((24, 24), (24, 24)), ((9, 7), (1, 1)),
         ((1, 1), (5, 3)), ((97, 131), (33, 41))]  # fmt: skip


def make_case(samples, images, side, seed=0):
    """Images, boxes, rows and affine."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (images, *side, 3), dtype=torch.uint8, generator=generator)
    rows = torch.randint(0, images, (samples,), generator=generator)
    high, wide = (torch.randint(1, s + 1, (samples,), generator=generator) for s in side)
    top, left = (
        (torch.rand(samples, generator=generator) * (s - x + 1)).long() for s, x in zip(side, (high, wide), strict=True)
    )
    flip = torch.arange(samples) % 2
    boxes = torch.stack([top, left, high, wide, flip], 1).int()
    boxes[0] = torch.tensor([0, 0, *side, 0])
    return pixels, boxes, rows, torch.randn(2, 3, generator=generator)


def resized_by_pillow(images, boxes, rows, size):
    """Crop, resize along the width, then along the height, and mirror: uint8 (B, h, w, 3).

    In one call Pillow may take the height first, since version 13.
    """
    found = []
    for row, (top, left, high, wide, flip) in zip(rows.tolist(), boxes.tolist(), strict=True):
        image = Image.fromarray(images[row].numpy()).crop((left, top, left + wide, top + high))
        for scaled in ((size[1], high), (size[1], size[0])):
            image = image.resize(scaled, Image.Resampling.BILINEAR)
        found.append(np.asarray(image)[:, :: -1 if flip else 1])
    return torch.from_numpy(np.stack(found))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(("side", "size"), SIZES)
def test_pixels_are_those_of_pillow(side, size, backend):
    images, boxes, rows, _ = make_case(24, 5, side)
    out = crop_views(images, boxes, UNSCALED, size=size, rows=rows, backend=backend)
    expected = resized_by_pillow(images, boxes, rows, size)
    assert torch.equal(out.permute(0, 2, 3, 1).to(torch.uint8), expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [64, 224])
def test_weights_are_those_that_pillow_computes_in_floating_point(size):
    extents = torch.arange(1, 1025)
    places, weights = (x.numpy() for x in _taps(extents, 1024, size))
    scale = extents.numpy()[:, None, None] / size
    reach = np.maximum(scale, 1.0)
    center = (np.arange(size)[:, None] + 0.5) * scale
    low = np.maximum((center - reach + 0.5).astype(np.int64), 0)
    high = np.minimum((center + reach + 0.5).astype(np.int64), extents.numpy()[:, None, None])
    at = places[..., :1] + np.arange(weights.shape[2])
    floats = np.where((at >= low) & (at < high), np.maximum(1 - np.abs((at - center + 0.5) * (1 / reach)), 0), 0.0)
    total = np.zeros_like(center)
    for k in range(weights.shape[2]):  # in Pillow's order
        total[..., 0] += floats[..., k]
    assert np.array_equal((floats / total * 2**22 + 0.5).astype(np.int64), weights)


@settings(max_examples=40, deadline=None)
@given(*[st.integers(1, 40)] * 4, st.integers(0, 2**31))
def test_native_is_bit_equal_to_the_reference(height, width, high, wide, seed):
    images, boxes, rows, affine = make_case(4, 2, (height, width), seed)
    options = {"size": (high, wide), "rows": rows}
    assert torch.equal(
        crop_views(images, boxes, affine, **options, backend="native"),
        crop_views_reference(images, boxes, affine, **options),
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("side", "size"), SIZES)
def test_every_instruction_set_and_the_reference_give_the_same_bits(side, size, dtype):
    images, boxes, rows, affine = make_case(9, 3, side)
    expected = crop_views_reference(images, boxes, affine, size=size, rows=rows, dtype=dtype)
    for level in (0, 1, 2):
        out = native.crop_views(images, rows, boxes, affine, size, dtype, isa_limit=level)
        assert out.dtype == dtype
        assert torch.equal(out, expected), level


def test_result_does_not_depend_on_thread_count():
    images, boxes, rows, affine = make_case(300, 20, (40, 40))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(crop_views(images, boxes, affine, size=(32, 32), rows=rows, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_follows_the_exact_resize_within_a_gray_level():
    # Rounding along the width and along the height moves a value by up to one half each.
    images, boxes, rows, _ = make_case(8, 4, (20, 24))
    out = crop_views(images, boxes, UNSCALED, size=(10, 12), rows=rows)
    for row, (top, left, high, wide, flip), got in zip(rows.tolist(), boxes.tolist(), out, strict=True):
        piece = images[row, top : top + high, left : left + wide].permute(2, 0, 1).double()
        exact = F.interpolate(piece[None], size=(10, 12), mode="bilinear", antialias=True)[0]
        assert (got - (exact.flip(2) if flip else exact)).abs().max() <= 1.001


@pytest.mark.parametrize("backend", CPU)
def test_reads_strided_inputs_and_images_without_rows(backend):
    images, boxes, _, affine = make_case(6, 6, (12, 10))
    options = {"size": (7, 8), "backend": backend}
    expected = crop_views(images, boxes, affine, **options, rows=torch.arange(6))
    channels_first = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    strided = boxes.repeat_interleave(2, 0)[::2]
    assert torch.equal(crop_views(channels_first, strided, affine.t().contiguous().t(), **options), expected)
    assert crop_views(images[:0], boxes[:0], affine, **options).shape == (0, 3, 7, 8)


def test_float64_is_computed_by_the_reference():
    images, boxes, rows, affine = make_case(6, 3, (12, 10))
    out = crop_views(images, boxes, affine.double(), size=(8, 8), rows=rows, dtype=torch.float64)
    expected = resized_by_pillow(images, boxes, rows, (8, 8)) * affine[0].double() + affine[1].double()
    assert torch.equal(out, expected.permute(0, 3, 1, 2))


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(
    "box",
    [(-1, 0, 5, 5, 0), (0, 0, 0, 5, 0), (4, 0, 5, 5, 0), (0, 4, 5, 5, 0), (0, 0, 5, 5, 2), (0, 0, 5, 5, -1),
     (2**31 - 1, 0, 2, 2, 0)],
)  # fmt: skip
def test_rejects_boxes_outside_the_image_in_python_and_cpp_and_marks_them_in_the_reference(box, backend):
    images, boxes, _, affine = make_case(2, 2, (8, 8))
    boxes[1] = torch.tensor(box)
    with pytest.raises(ShapeError, match="does not lie in an image of 8x8"):
        crop_views(images, boxes, affine, size=(4, 4), backend=backend)
    with pytest.raises(ValueError, match="box"):
        native.crop_views(images, None, boxes, affine, (4, 4), torch.float32)
    marked = crop_views_reference(images, boxes, affine, size=(4, 4))
    assert marked.isnan().flatten(1).all(1).tolist() == [False, True]


def test_rejects_bad_arguments():
    images, boxes, rows, affine = make_case(3, 5, (8, 8))
    options = {"size": (4, 4), "rows": rows}
    with pytest.raises(DataError, match="uint8"):
        crop_views(images.int(), boxes, affine, **options)
    with pytest.raises(ShapeError, match=r"int32 \(3, 5\)"):
        crop_views(images, boxes[:, :4], affine, **options)
    with pytest.raises(ShapeError, match=r"`boxes` is torch\.int64"):
        crop_views(images, boxes.long(), affine, **options)
    with pytest.raises(ShapeError, match=r"`rows` go from"):
        crop_views(images, boxes, affine, size=(4, 4), rows=rows + 5)
    with pytest.raises(ValueError, match="row"):
        native.crop_views(images, rows + 5, boxes, affine, (4, 4), torch.float32)
    with pytest.raises(ValueError, match="each sample needs an image"):
        native.crop_views(images[:2], None, boxes, affine, (4, 4), torch.float32)
    with pytest.raises(ShapeError, match=r"`affine` is torch\.float16"):
        crop_views(images, boxes, affine.half(), **options)
    with pytest.raises(ShapeError, match="`affine` is on meta"):
        crop_views(images, boxes, affine.to("meta"), **options)
    with pytest.raises(ShapeError, match="cannot be cropped to 0x4"):
        crop_views(images, boxes, affine, size=(0, 4), rows=rows)
    large = torch.zeros(1, 4, 4000, 3, dtype=torch.uint8)
    with pytest.raises(ShapeError, match="4x4000 pixels cannot be cropped to 4x8: scale them"):
        crop_views(large, torch.tensor([[0, 0, 4, 4000, 0]], dtype=torch.int32), affine, size=(4, 8))
    # The numerators of the weights add up to 1,048,632 for 1,000 pixels of 22,896: more than 2**20.
    with pytest.raises(ShapeError, match="22896x1 pixels cannot be cropped to 1000x1"):
        crop_views(torch.zeros(1, 22896, 1, 3, dtype=torch.uint8), boxes[:1], affine, size=(1000, 1))
    with pytest.raises(ShapeError, match="1x30000 pixels cannot be cropped to 1x20000"):
        crop_views(torch.zeros(1, 1, 30000, 3, dtype=torch.uint8), boxes[:1], affine, size=(1, 20000))
    with pytest.raises(BackendUnavailable, match="triton"):
        crop_views(images, boxes, affine, **options, backend="triton")


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("backend", CPU)
def test_operator_passes_opcheck_and_compiles_without_a_graph_break(backend, with_rows):
    images, boxes, rows, affine = make_case(3, 3, (8, 9))
    rows = rows if with_rows else None
    arguments = (images, rows, boxes, affine, 5, 6, torch.bfloat16, backend)
    torch.library.opcheck(torch.ops.kdfast.crop_views, arguments)
    options = {"size": (5, 6), "rows": rows, "backend": backend}
    compiled = torch.compile(lambda *x: crop_views(*x, **options) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(images, boxes, affine), crop_views(images, boxes, affine, **options) * 2)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("side", "size"), SIZES)
def test_gpu_gives_the_same_bits_as_the_cpu_and_marks_bad_boxes(side, size, dtype, backend):
    images, boxes, rows, affine = make_case(20, 5, side)
    on_gpu = [x.cuda() for x in (images, boxes, affine)]
    out = crop_views(*on_gpu, size=size, rows=rows.cuda(), dtype=dtype, backend=backend)
    expected = crop_views(images, boxes, affine, size=size, rows=rows, dtype=dtype)
    assert torch.equal(out.cpu(), expected)
    boxes[1, 0], rows[2] = -1, 5
    boxes, rows = boxes.cuda(), rows.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = crop_views(on_gpu[0], boxes, on_gpu[2], size=size, rows=rows, dtype=dtype, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isnan().flatten(1).all(1).tolist() == [i in (1, 2) for i in range(20)]
