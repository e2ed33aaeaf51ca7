from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

from kdfast.data.views import Normalization, ViewSpec, apply_views, draw_view_indices, view_boxes, view_table
from kdfast.errors import DataError, ShapeError, UsageError

CIFAR = ViewSpec("shift", (32, 32), pad=4, flip=True)
SVHN = ViewSpec("shift", (32, 32), pad=4)
DIGITS = ViewSpec("shift", (8, 8), pad=1)
LARGE = ViewSpec("crop", (24, 20), flip=True, crops=50, seed=3)
NORM = Normalization((0.49, 0.48, 0.45), (0.25, 0.24, 0.26))
IDS = np.array([0, 1, 2, 49_999, 1_281_166])


def pixels(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, height, width, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(
    ("spec", "count", "identity"), [(CIFAR, 162, 80), (SVHN, 81, 40), (DIGITS, 9, 4), (LARGE, 50, 0)]
)
def test_count_and_identity(spec, count, identity):
    assert (spec.count, spec.identity) == (count, identity)


@pytest.mark.parametrize("spec", [CIFAR, DIGITS, LARGE])
def test_spec_round_trips_through_its_dict(spec):
    assert ViewSpec.from_dict(spec.to_dict()) == spec
    assert "(" not in str(spec.to_dict())  # plain JSON values


def test_rejects_damaged_and_foreign_specs():
    fields = CIFAR.to_dict()
    with pytest.raises(DataError, match="version 2"):
        ViewSpec.from_dict({**fields, "version": 2})
    with pytest.raises(DataError, match="crop views have version 1; this kdfast needs version 2: rebuild the cache"):
        ViewSpec.from_dict({**LARGE.to_dict(), "version": 1})
    with pytest.raises(DataError, match="needs exactly"):
        ViewSpec.from_dict({**fields, "color": 1})
    with pytest.raises(DataError, match="needs exactly"):
        ViewSpec.from_dict({"kind": "shift"})
    with pytest.raises(DataError, match="damaged view spec"):
        ViewSpec.from_dict({**fields, "pad": "four"})
    with pytest.raises(DataError, match="damaged view spec"):
        ViewSpec.from_dict({**fields, "pad": -1})


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "zoom"},
        {"size": (0, 8)},
        {"pad": -1},
        {"pad": 9},
        {"crops": 3},
        {"kind": "crop", "pad": 1},
        {"kind": "crop", "crops": 0},
        {"kind": "crop", "scale": (0.5, 0.1)},
        {"kind": "crop", "ratio": (0.0, 1.0)},
    ],
)
def test_rejects_invalid_specs(fields):
    with pytest.raises(UsageError):
        ViewSpec(**{"kind": "shift", "size": (8, 8), **fields})


@pytest.mark.parametrize("std", [(1, 1, 0), (1, 1, float("nan")), (1, 1), (1, 1, float("inf"))])
def test_rejects_invalid_normalizations(std):
    with pytest.raises(UsageError, match="normalization"):
        Normalization((0, 0, 0), std)


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        ((127.0, 127.0, 127.0), (0.5, 0.5, 0.5)),
        ((0.5, 0.5, 2.1), (0.5, 0.5, 0.5)),
        ((-1.1, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ((0.5, 0.5, 0.5), (0.5, 58.4, 0.5)),
        ((123.7, 116.3, 103.5), (1.0, 1.0, 1.0)),
        ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    ],
)
def test_rejects_normalizations_on_the_scale_of_255(mean, std):
    with pytest.raises(UsageError, match=r"0\.\.255.*divide .*by 255"):
        Normalization(mean, std)


@pytest.mark.parametrize("mean", [(0, 0, 0), (0.5, 0.5, 0.5), (0.485, 0.456, 0.406), (1, 1, 1)])
@pytest.mark.parametrize("std", [(1, 1, 1), (0.5, 0.5, 0.5), (0.229, 0.224, 0.225), (1 / 255, 1 / 255, 1 / 255)])
def test_accepts_common_normalizations(mean, std):
    assert Normalization(mean, std).affine().isfinite().all()


def test_values_never_change():
    assert view_table(CIFAR, 0, IDS, 4).tolist() == [
        [80, 135, 125, 0],
        [80, 120, 65, 9],
        [80, 60, 152, 71],
        [80, 12, 53, 27],
        [80, 92, 18, 116],
    ]
    assert [draw_view_indices(0, epoch, IDS, 162).tolist() for epoch in (0, 1, 161, 162)] == [
        [7, 130, 52, 81, 152],
        [50, 0, 25, 50, 128],
        [103, 151, 150, 77, 13],
        [0, 51, 145, 19, 108],
    ]
    assert draw_view_indices(7, 3, IDS, 5).tolist() == [2, 3, 1, 3, 3]


@settings(max_examples=30)
@given(st.sampled_from([CIFAR, SVHN, DIGITS, LARGE]), st.integers(0, 2**64), st.data())
def test_tables_are_distinct_start_with_the_identity_and_nest(spec, seed, data):
    many = data.draw(st.integers(1, spec.count - 1))
    few = data.draw(st.integers(1, many))
    ids = np.arange(1000, 1040)
    table = view_table(spec, seed, ids, many)
    assert table.shape == (40, many)
    assert table.dtype == np.int64
    assert (table[:, 0] == spec.identity).all()
    assert ((table >= 0) & (table < spec.count)).all()
    assert all(len(set(row)) == many for row in table.tolist())
    assert (table[:, :few] == view_table(spec, seed, ids, few)).all()
    assert (table[7:9] == view_table(spec, seed, ids[7:9], many)).all()


def test_view_index_equals_view_id_in_a_table_of_all_views():
    assert (view_table(CIFAR, 5, IDS, 162) == np.arange(162)).all()
    assert view_table(CIFAR, 5, IDS, 1).tolist() == [[80]] * 5
    assert view_table(ViewSpec("shift", (8, 8)), 5, IDS, 1).tolist() == [[0]] * 5


def test_table_uses_views_evenly_and_depends_on_the_seed():
    table = view_table(CIFAR, 1, np.arange(50_000), 3)
    counts = np.bincount(table[:, 1:].ravel(), minlength=162)
    assert counts[80] == 0
    assert stats.chisquare(np.delete(counts, 80)).pvalue > 1e-3
    other = view_table(CIFAR, 2, np.arange(50_000), 3)
    assert (table[:, 1] == other[:, 1]).mean() < 0.01


@pytest.mark.parametrize("n_views", [0, 163, -1])
def test_rejects_impossible_numbers_of_views(n_views):
    with pytest.raises(UsageError, match="must be 1 to 162"):
        view_table(CIFAR, 0, IDS, n_views)


@pytest.mark.parametrize("n_views", [1, 2, 3, 9, 20, 162])
def test_each_block_of_epochs_uses_each_view_once(n_views):
    ids = np.arange(200)
    for block in (0, 1, 5):
        epochs = range(block * n_views, (block + 1) * n_views)
        visited = np.stack([draw_view_indices(4, epoch, ids, n_views) for epoch in epochs])
        assert (np.sort(visited, axis=0) == np.arange(n_views)[:, None]).all()


@pytest.mark.parametrize("n_views", [4, 162])
def test_view_indices_are_uniform_within_an_epoch_and_independent_across_epochs_and_seeds(n_views):
    ids = np.arange(100_000)
    now, later = draw_view_indices(0, 2, ids, n_views), draw_view_indices(0, 2 + n_views, ids, n_views)
    other = draw_view_indices(1, 2, ids, n_views)
    assert stats.chisquare(np.bincount(now, minlength=n_views)).pvalue > 1e-3
    for second in (later, other, np.roll(now, 1)):
        step = np.bincount((second - now) % n_views, minlength=n_views)
        assert stats.chisquare(step).pvalue > 1e-3


@given(st.permutations(range(30)), st.integers(0, 500), st.integers(1, 162))
def test_view_index_depends_only_on_its_sample(order, epoch, n_views):
    ids = np.arange(30)
    assert (draw_view_indices(9, epoch, ids[order], n_views) == draw_view_indices(9, epoch, ids, n_views)[order]).all()


def test_draw_view_indices_rejects_invalid_arguments():
    with pytest.raises(UsageError, match="at least 1 view"):
        draw_view_indices(0, 0, IDS, 0)
    with pytest.raises(UsageError, match="epochs from 0"):
        draw_view_indices(0, -1, IDS, 3)


def offsets_of(spec):
    """Top, left and flip of every view, in the order of their ids."""
    side = 2 * spec.pad + 1
    return itertools.product(range(side), range(side), range(2 if spec.flip else 1))


@pytest.mark.parametrize("spec", [CIFAR, SVHN, DIGITS])
def test_every_shift_matches_padding_cropping_and_flipping(spec):
    images = pixels(spec.count, *spec.size)
    views = apply_views(images, torch.arange(spec.count), spec, NORM)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (NORM.mean, NORM.std))
    for image, view, (top, left, flip) in zip(images, views, offsets_of(spec), strict=True):
        padded = F.pad(image.permute(2, 0, 1), (spec.pad,) * 4)
        window = padded[:, top : top + spec.size[0], left : left + spec.size[1]]
        expected = ((window.flip(2) if flip else window).double() / 255 - mean) / std
        # Two roundings of values of up to 4, and those of scale and bias.
        torch.testing.assert_close(view.double(), expected, rtol=0, atol=8e-7)
    assert views.is_contiguous(memory_format=torch.channels_last)
    assert list(offsets_of(spec))[spec.identity] == (spec.pad, spec.pad, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("spec", [CIFAR, LARGE])
def test_every_dtype_is_exact_up_to_rounding(spec, dtype):
    images, ids = pixels(6, 32, 32), np.arange(6)
    view = apply_views(images, ids, spec, NORM, sample_ids=ids, dtype=dtype)
    exact = apply_views(images, ids, spec, NORM, sample_ids=ids, dtype=torch.float64)
    assert view.dtype == dtype
    unit = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-24, torch.float64: 0}[dtype]
    # float32 arithmetic before the last rounding.
    arithmetic = 8e-7 if dtype != torch.float64 else 0
    assert ((view.double() - exact).abs() <= unit * exact.abs() + arithmetic).all()


def test_identity_crop_is_the_whole_image_resized():
    images = pixels(3, 40, 40)
    view = apply_views(images, np.zeros(3, np.int64), LARGE, NORM, sample_ids=np.arange(3), dtype=torch.float64)
    wide = (Image.fromarray(image.numpy()).resize((20, 40), Image.Resampling.BILINEAR) for image in images)
    resized = np.stack([np.asarray(image.resize((20, 24), Image.Resampling.BILINEAR)) for image in wide])
    resized = torch.from_numpy(resized).permute(0, 3, 1, 2).double()
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (NORM.mean, NORM.std))
    torch.testing.assert_close(view, (resized / 255 - mean) / std, rtol=0, atol=1e-9)
    assert view.is_contiguous(memory_format=torch.channels_last)


def test_crops_depend_only_on_sample_view_and_seed():
    images = pixels(1, 40, 40).expand(4, -1, -1, -1)
    ids, views = np.array([10, 10, 11, 10]), np.array([5, 6, 5, 5])
    a, b, c, d = apply_views(images, views, LARGE, NORM, sample_ids=ids)
    assert torch.equal(a, d)
    assert not torch.equal(a, b)
    assert not torch.equal(a, c)
    alone = apply_views(images[:1], views[:1], LARGE, NORM, sample_ids=torch.tensor([10]))
    assert torch.equal(alone[0], a)
    reseeded = ViewSpec.from_dict({**LARGE.to_dict(), "seed": 4})
    assert not torch.equal(apply_views(images[:1], views[:1], reseeded, NORM, sample_ids=ids[:1])[0], a)


def test_boxes_drawn_ahead_are_those_drawn_with_the_views():
    table, ids, views = pixels(5, 40, 30), np.array([7, 8, 9, 7, 5, 3]), np.array([0, 1, 2, 3, 0, 49])
    rows = torch.tensor([4, 4, 0, 1, 2, 3])
    boxes = view_boxes(LARGE, ids, views, (40, 30))
    assert boxes[0].tolist() == boxes[4].tolist() == [0, 0, 40, 30, 0]
    drawn = apply_views(table, views, LARGE, NORM, sample_ids=ids, rows=rows)
    assert torch.equal(apply_views(table, views, LARGE, NORM, rows=rows, boxes=boxes), drawn)


@pytest.mark.parametrize("spec", [CIFAR, LARGE])
def test_accepts_an_empty_batch(spec):
    none = np.zeros(0, np.int64)
    assert apply_views(pixels(0, 32, 32), none, spec, NORM, sample_ids=none).shape == (0, 3, *spec.size)


def test_rejects_invalid_input_and_names_its_shape():
    images, ids = pixels(4, 32, 32), np.arange(4)
    with pytest.raises(DataError, match=r"torch\.float32"):
        apply_views(images.float(), ids, CIFAR, NORM)
    with pytest.raises(ShapeError, match=r"\(4, 3, 32, 32\)"):
        apply_views(images.permute(0, 3, 1, 2), ids, CIFAR, NORM)
    with pytest.raises(ShapeError, match=r"\(3,\).*\(4,\)"):
        apply_views(images, ids[:3], CIFAR, NORM)
    with pytest.raises(ShapeError, match="integers"):
        apply_views(images, torch.rand(4), CIFAR, NORM)
    with pytest.raises(ShapeError, match="0 to 161"):
        apply_views(images, ids + 159, CIFAR, NORM)
    with pytest.raises(ShapeError, match="0 to 161"):
        apply_views(images, ids - 1, CIFAR, NORM)
    with pytest.raises(ShapeError, match="32x32"):
        apply_views(images[:, :8], ids, CIFAR, NORM)
    with pytest.raises(ShapeError, match="floating dtype"):
        apply_views(images, ids, CIFAR, NORM, dtype=torch.int32)
    with pytest.raises(ShapeError, match="floating dtype"):
        apply_views(images, ids, LARGE, NORM, sample_ids=ids, dtype=torch.int32)
    with pytest.raises(UsageError, match="sample_ids"):
        apply_views(images, ids, LARGE, NORM)
    with pytest.raises(ShapeError, match="`sample_ids` is int64"):
        apply_views(images, ids, LARGE, NORM, sample_ids=ids[:2])


def test_views_made_in_inference_mode_do_not_affect_later_training():
    norm = Normalization((0.1, 0.2, 0.3), (1.0, 1.0, 1.0))  # not in the cache yet
    with torch.inference_mode():
        apply_views(pixels(2, 8, 8), np.zeros(2, np.int64), DIGITS, norm)
    weight = torch.ones(1, requires_grad=True)
    (apply_views(pixels(2, 8, 8), np.zeros(2, np.int64), DIGITS, norm) * weight).sum().backward()
    assert weight.grad is not None
