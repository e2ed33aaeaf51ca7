"""Shifted and cropped views: backends, bit equality, dtypes and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.errors import BackendUnavailable, DataError, ShapeError
from kdfast.ops import native
from kdfast.ops.backends import TABLE
from kdfast.ops.views import crop_views, shift_views, shift_views_reference

CPU = TABLE["views", "cpu"]


def make_case(batch, height, width, pad, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, height, width, 3), dtype=torch.uint8, generator=generator)
    affine = torch.randn(2, 3, dtype=torch.float64, generator=generator).to(torch.promote_types(dtype, torch.float32))
    offsets = torch.randint(0, 2 * pad + 1, (batch, 3), dtype=torch.int32, generator=generator)
    offsets[:, 2] %= 2
    return images, offsets, affine


def shift_by_pixel_loop(images, offsets, affine, pad):
    batch, height, width, _ = images.shape
    out = torch.empty(batch, 3, height, width, dtype=affine.dtype)
    for b, c, y, x in np.ndindex(*out.shape):
        top, left, flip = offsets[b].tolist()
        row, column = top + y - pad, left + (width - 1 - x if flip else x) - pad
        inside = 0 <= row < height and 0 <= column < width
        pixel = images[b, row, column, c] if inside else torch.tensor(0)
        out[b, c, y, x] = pixel.to(affine.dtype) * affine[0, c] + affine[1, c]
    return out


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6), st.integers(0, 8), st.integers(0, 2**31))
def test_every_backend_matches_a_loop_over_pixels(batch, height, width, pad, seed):
    images, offsets, affine = make_case(batch, height, width, pad, seed=seed)
    expected = shift_by_pixel_loop(images, offsets, affine, pad)
    for backend in CPU:
        assert torch.equal(shift_views(images, offsets, affine, pad=pad, backend=backend), expected), backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(162, 32, 32, 4), (500, 8, 8, 1), (1, 33, 65, 4), (0, 32, 32, 4)])
def test_native_is_bit_equal_to_the_reference(shape, dtype):
    *size, pad = shape
    images, offsets, affine = make_case(*size, pad)
    out = shift_views(images, offsets, affine, pad=pad, dtype=dtype, backend="native")
    assert torch.equal(out, shift_views_reference(images, offsets, affine, pad=pad, dtype=dtype))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)


def test_result_does_not_depend_on_thread_count():
    images, offsets, affine = make_case(3000, 32, 32, 4)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(shift_views(images, offsets, affine, pad=4, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("backend", CPU)
def test_reads_strided_inputs(backend):
    images, offsets, affine = make_case(6, 8, 8, 2)
    expected = shift_views(images, offsets, affine, pad=2, backend=backend)
    channels_first = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not channels_first.is_contiguous()
    strided_moves = offsets.repeat_interleave(2, dim=1)[:, ::2]
    strided_affine = affine.t().contiguous().t()
    assert torch.equal(shift_views(channels_first, strided_moves, strided_affine, pad=2, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_instruction_set_gives_the_same_bits(dtype):
    images, offsets, affine = make_case(200, 13, 11, 4)
    levels = [native.shift_views(images, offsets, affine, 4, dtype, isa_limit=level) for level in (0, 1, 2)]
    assert all(torch.equal(levels[0], other) for other in levels[1:])


def test_float64_is_computed_by_the_reference():
    images, offsets, affine = make_case(5, 8, 8, 2, torch.float64)
    out = shift_views(images, offsets, affine, pad=2, dtype=torch.float64, backend="reference")
    assert torch.equal(out, shift_by_pixel_loop(images, offsets, affine, 2))


@pytest.mark.parametrize("move", [(-1, 0, 0), (0, -1, 0), (9, 0, 0), (0, 9, 0), (0, 0, 2), (0, 0, -1)])
def test_rejects_move_outside_the_image_in_python_and_cpp(move):
    images, offsets, affine = make_case(3, 8, 8, 4)
    offsets[1] = torch.tensor(move, dtype=torch.int32)
    with pytest.raises(ShapeError, match="an offset leaves the image"):
        shift_views(images, offsets, affine, pad=4)
    with pytest.raises(ValueError, match="leaves the padded image"):
        native.shift_views(images, offsets, affine, 4, torch.float32)


def test_rejects_bad_arguments():
    images, offsets, affine = make_case(3, 8, 8, 4)
    with pytest.raises(DataError, match="uint8"):
        shift_views(images.int(), offsets, affine, pad=4)
    with pytest.raises(ShapeError, match=r"\(3, 8, 8\)"):
        shift_views(images[..., 0], offsets, affine, pad=4)
    with pytest.raises(ShapeError, match="int64"):
        shift_views(images, offsets.long(), affine, pad=4)
    with pytest.raises(ShapeError, match=r"\(2, 3\)"):
        shift_views(images, offsets[:2], affine, pad=4)
    with pytest.raises(ShapeError, match=r"\(2, 2\)"):
        shift_views(images, offsets, affine[:, :2], pad=4)
    with pytest.raises(ShapeError, match=r"torch\.int32"):
        shift_views(images, offsets, affine.int(), pad=4)
    with pytest.raises(ShapeError, match=r"`affine` is torch\.float16"):
        crop_views(images, torch.ones(3, 5).int(), affine.half(), size=(4, 4))
    with pytest.raises(BackendUnavailable, match="triton"):
        shift_views(images, offsets, affine, pad=4, backend="triton")


@pytest.mark.parametrize("backend", CPU)
def test_operator_passes_opcheck(backend):
    images, offsets, affine = make_case(3, 8, 8, 4)
    torch.library.opcheck(torch.ops.kdfast.shift_views, (images, offsets, affine, 4, torch.float32, backend))


def test_crops_match_slicing_resizing_and_flipping():
    images, _, affine = make_case(4, 20, 24, 0, torch.float64)
    boxes = torch.tensor([[0, 0, 20, 24, 0], [3, 5, 1, 1, 0], [2, 4, 17, 9, 1], [19, 0, 1, 24, 1]], dtype=torch.int32)
    out = crop_views(images, boxes, affine, size=(10, 12), dtype=torch.float64)
    for image, (top, left, height, width, flip), got in zip(images, boxes.tolist(), out, strict=True):
        piece = image[top : top + height, left : left + width]
        values = (piece.double() * affine[0] + affine[1]).permute(2, 0, 1)
        expected = F.interpolate(values[None], size=(10, 12), mode="bilinear", antialias=True)[0]
        torch.testing.assert_close(got, expected.flip(2) if flip else expected)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "box", [(-1, 0, 5, 5, 0), (0, 0, 0, 5, 0), (4, 0, 5, 5, 0), (0, 4, 5, 5, 0), (0, 0, 5, 5, 2), (0, 0, 5, 5, -1)]
)
def test_rejects_boxes_outside_the_image(box):
    images, _, affine = make_case(1, 8, 8, 0)
    with pytest.raises(ShapeError, match="does not lie in an image of 8x8"):
        crop_views(images, torch.tensor([box], dtype=torch.int32), affine, size=(4, 4))
    with pytest.raises(ShapeError, match=r"\(1, 5\)"):
        crop_views(images, torch.tensor([box])[:, :4].int(), affine, size=(4, 4))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gpu_gives_the_same_bits_as_the_cpu(dtype):
    images, offsets, affine = make_case(300, 32, 32, 4)
    out = shift_views(images.cuda(), offsets, affine.cuda(), pad=4, dtype=dtype)
    assert out.device.type == "cuda"
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out.cpu(), shift_views(images, offsets, affine, pad=4, dtype=dtype))
