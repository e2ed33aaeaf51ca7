"""Shifted views: backends, bit equality, dtypes and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdfast.errors import BackendUnavailable, DataError, ShapeError
from kdfast.ops import native
from kdfast.ops.backends import TABLE
from kdfast.ops.views import gather_views, gather_views_reference

CPU, GPU = TABLE["views", "cpu"], TABLE["views", "cuda"]


def make_case(samples, images, height, width, pad, flip=True, dtype=torch.float32, seed=0):
    """Images, rows, view ids and affine; the keyword arguments of `gather_views`."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (images, height, width, 3), dtype=torch.uint8, generator=generator)
    rows = torch.randint(0, max(images, 1), (samples,), generator=generator)
    view_ids = torch.randint(0, (2 * pad + 1) ** 2 * (1 + flip), (samples,), generator=generator)
    affine = torch.randn(2, 3, dtype=torch.float64, generator=generator).to(torch.promote_types(dtype, torch.float32))
    return (pixels, rows, view_ids, affine), {"pad": pad, "flip": flip}


def gather_by_pixel_loop(images, rows, view_ids, affine, *, pad, flip):
    height, width = images.shape[1:3]
    out = torch.empty(len(rows), 3, height, width, dtype=affine.dtype)
    for b, c, y, x in np.ndindex(*out.shape):
        shift, mirrored = divmod(int(view_ids[b]), 2) if flip else (int(view_ids[b]), 0)
        top, left = divmod(shift, 2 * pad + 1)
        line, column = top + y - pad, left + (width - 1 - x if mirrored else x) - pad
        inside = 0 <= line < height and 0 <= column < width
        pixel = images[rows[b], line, column, c] if inside else torch.tensor(0)
        out[b, c, y, x] = pixel.to(affine.dtype) * affine[0, c] + affine[1, c]
    return out


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 8),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_every_backend_matches_a_loop_over_pixels(samples, images, height, width, pad, flip, seed):
    tensors, options = make_case(samples, images, height, width, pad, flip, seed=seed)
    expected = gather_by_pixel_loop(*tensors, **options)
    for backend in CPU:
        assert torch.equal(gather_views(*tensors, **options, backend=backend), expected), backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "shape", [(162, 100, 32, 32, 4), (500, 7, 8, 8, 1), (9, 2, 33, 65, 4), (0, 3, 32, 32, 4), (0, 0, 8, 8, 1)]
)
def test_native_is_bit_equal_to_the_reference(shape, dtype):
    tensors, options = make_case(*shape)
    out = gather_views(*tensors, **options, dtype=dtype, backend="native")
    reference = gather_views_reference(*tensors, **options, dtype=dtype)
    assert torch.equal(out, reference)
    for result in (out, reference):
        assert result.dtype == dtype
        assert result.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", CPU)
def test_without_rows_each_sample_has_its_own_image(backend):
    (images, _, view_ids, affine), options = make_case(20, 20, 8, 8, 2)
    out = gather_views(images, None, view_ids, affine, **options, backend=backend)
    assert torch.equal(out, gather_views(images, torch.arange(20), view_ids, affine, **options, backend=backend))


def test_result_does_not_depend_on_thread_count():
    tensors, options = make_case(3000, 500, 32, 32, 4)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(gather_views(*tensors, **options, backend="native"))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], r) for r in results[1:])


@pytest.mark.parametrize("backend", CPU)
def test_reads_strided_inputs(backend):
    (images, rows, view_ids, affine), options = make_case(6, 6, 8, 8, 2)
    expected = gather_views(images, rows, view_ids, affine, **options, backend=backend)
    channels_first = images.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    assert not channels_first.is_contiguous()
    strided = [x.repeat_interleave(2)[::2] for x in (rows, view_ids)]
    strided_affine = affine.t().contiguous().t()
    assert torch.equal(gather_views(channels_first, *strided, strided_affine, **options, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_instruction_set_gives_the_same_bits(dtype):
    tensors, options = make_case(200, 30, 13, 11, 4)
    levels = [native.gather_views(*tensors, *options.values(), dtype, isa_limit=level) for level in (0, 1, 2)]
    assert all(torch.equal(levels[0], other) for other in levels[1:])


def test_float64_is_computed_by_the_reference():
    tensors, options = make_case(5, 3, 8, 8, 2, dtype=torch.float64)
    expected = gather_by_pixel_loop(*tensors, **options)
    for backend in ("auto", "reference"):
        assert torch.equal(gather_views(*tensors, **options, dtype=torch.float64, backend=backend), expected)


@pytest.mark.parametrize("backend", CPU)
@pytest.mark.parametrize(("flip", "views"), [(True, 162), (False, 81)])
def test_rejects_indices_out_of_range_in_python_and_cpp(backend, flip, views):
    (images, rows, view_ids, affine), options = make_case(3, 5, 8, 8, 4, flip)
    native_options = (*options.values(), torch.float32)
    for bad in (-1, views):
        ids = torch.tensor([0, bad, 1])
        with pytest.raises(ShapeError, match=rf"`view_ids` go from .*: must be 0 to {views - 1}"):
            gather_views(images, rows, ids, affine, **options, backend=backend)
        with pytest.raises(ValueError, match="view id"):
            native.gather_views(images, rows, ids, affine, *native_options)
    for bad in (-1, 5):
        some = torch.tensor([0, bad, 1])
        with pytest.raises(ShapeError, match=r"`rows` go from .*: must be 0 to 4"):
            gather_views(images, some, view_ids, affine, **options, backend=backend)
        with pytest.raises(ValueError, match="row"):
            native.gather_views(images, some, view_ids, affine, *native_options)
    with pytest.raises(ValueError, match="each sample needs an image"):
        native.gather_views(images[:2], None, view_ids, affine, *native_options)


def test_reference_marks_indices_out_of_range():
    (images, rows, view_ids, affine), options = make_case(6, 5, 8, 8, 4)
    rows[1], rows[2], view_ids[3], view_ids[4] = -1, 5, -1, 162
    out = gather_views_reference(images, rows, view_ids, affine, **options)
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, True, True, True, False]
    assert torch.equal(out[[0, 5]], gather_views(images, rows[[0, 5]], view_ids[[0, 5]], affine, **options))


def test_rejects_bad_arguments():
    (images, rows, view_ids, affine), options = make_case(3, 5, 8, 8, 4)
    with pytest.raises(DataError, match="uint8"):
        gather_views(images.int(), rows, view_ids, affine, **options)
    with pytest.raises(ShapeError, match=r"\(5, 8, 8\)"):
        gather_views(images[..., 0], rows, view_ids, affine, **options)
    with pytest.raises(ShapeError, match=r"`view_ids` is torch\.int32"):
        gather_views(images, rows, view_ids.int(), affine, **options)
    with pytest.raises(ShapeError, match=r"`rows` is torch\.int32"):
        gather_views(images, rows.int(), view_ids, affine, **options)
    with pytest.raises(ShapeError, match=r"`view_ids` is .* \(2,\) .* \(3,\)"):
        gather_views(images, rows, view_ids[:2], affine, **options)
    with pytest.raises(ShapeError, match=r"`view_ids` is .* \(3,\) .* \(5,\)"):
        gather_views(images, None, view_ids, affine, **options)
    with pytest.raises(ShapeError, match=r"`rows` is .* on meta"):
        gather_views(images, rows.to("meta"), view_ids, affine, **options)
    with pytest.raises(ShapeError, match="`images` is empty"):
        gather_views(images[:0], rows, view_ids, affine, **options)
    with pytest.raises(ShapeError, match=r"\(2, 2\)"):
        gather_views(images, rows, view_ids, affine[:, :2], **options)
    with pytest.raises(ShapeError, match=r"`affine` is torch\.int32"):
        gather_views(images, rows, view_ids, affine.int(), **options)
    with pytest.raises(ShapeError, match="`affine` is on meta"):
        gather_views(images, rows, view_ids, affine.to("meta"), **options)
    with pytest.raises(BackendUnavailable, match="triton"):
        gather_views(images, rows, view_ids, affine, **options, backend="triton")


@pytest.mark.parametrize("with_rows", [True, False])
@pytest.mark.parametrize("backend", CPU)
def test_operator_passes_opcheck(backend, with_rows):
    (images, rows, view_ids, affine), options = make_case(3, 3, 8, 8, 4)
    arguments = (images, rows if with_rows else None, view_ids, affine, *options.values(), torch.bfloat16, backend)
    torch.library.opcheck(torch.ops.kdfast.gather_views, arguments)


@pytest.mark.parametrize("with_rows", [True, False])
def test_compiles_without_a_graph_break(with_rows):
    (images, rows, view_ids, affine), options = make_case(3, 3, 8, 8, 4)
    arguments = (images, rows if with_rows else None, view_ids, affine)
    compiled = torch.compile(lambda *x: gather_views(*x, **options) * 2, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), gather_views(*arguments, **options) * 2)


def test_meta_tensors_give_the_shape():
    tensors, options = make_case(7, 3, 8, 6, 2)
    out = gather_views(*(x.to("meta") for x in tensors), **options, dtype=torch.bfloat16)
    assert (out.device.type, out.shape, out.dtype) == ("meta", (7, 3, 8, 6), torch.bfloat16)
    assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", GPU)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(300, 50, 32, 32, 4), (500, 7, 8, 8, 1), (9, 2, 33, 65, 4), (0, 3, 32, 32, 4)])
def test_gpu_gives_the_same_bits_as_the_cpu(shape, dtype, backend):
    tensors, options = make_case(*shape)
    out = gather_views(*(x.cuda() for x in tensors), **options, dtype=dtype, backend=backend)
    assert out.device.type == "cuda"
    assert out.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(out.cpu(), gather_views(*tensors, **options, dtype=dtype))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", GPU)
def test_gpu_marks_indices_out_of_range_without_a_synchronization(backend):
    (images, rows, view_ids, affine), options = make_case(6, 5, 8, 8, 4)
    rows[1], rows[2], view_ids[3], view_ids[4] = -1, 5, -1, 162
    on_gpu = [x.cuda() for x in (images, rows, view_ids, affine)]
    gather_views(*on_gpu, **options, backend=backend)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = gather_views(*on_gpu, **options, backend=backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert out.isnan().flatten(1).all(1).tolist() == [False, True, True, True, True, False]
    good = [0, 5]
    assert torch.equal(out[good].cpu(), gather_views(images, rows[good], view_ids[good], affine, **options))
