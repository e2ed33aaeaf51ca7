"""Cached and online targets: the same logits on the same views, up to float16 rounding."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kdfast.data.loaders import ResidentLoader
from kdfast.data.order import epoch_order
from kdfast.data.readers.registry import open_source
from kdfast.data.views import Normalization
from kdfast.distillation import targets as targets_module
from kdfast.distillation.batches import Batches
from kdfast.distillation.config import RunConfig
from kdfast.distillation.targets import CachedTargets, OnlineTargets, TeacherTargets
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.row_format import TopK

VIEWS = 4
CPU = torch.device("cpu")
IDS = np.arange(0, 200, 2, dtype=np.int64)


@pytest.fixture(scope="module")
def source():
    return open_source("digits")


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    net = build_net("resnet8", 10).eval()
    # Not the student's normalization: teacher and student must each get their own.
    return Model(net, "resnet8", 10, tuple("0123456789"), Normalization((0.2, 0.3, 0.4), (0.5, 0.6, 0.7)), {})


@pytest.fixture(scope="module")
def cache(source, model: Model, tmp_path_factory: pytest.TempPathFactory) -> TeacherCache:
    out: Path = tmp_path_factory.mktemp("targets") / "cache"
    build_cache(source, model, out, ids=IDS, n_views=VIEWS, view_seed=7)
    return TeacherCache.open(out, source=source, teacher=model)


def make_batches(source, targets, n_views: int = VIEWS, batch_size: int = 13) -> Batches:
    return Batches(
        IDS, ResidentLoader(source.train), source.view_spec, n_views=n_views, view_seed=7, targets=targets,
        batch_size=batch_size, seed=3,
    )  # fmt: skip


@pytest.mark.parametrize("n_views", [1, 2, VIEWS])
def test_cached_logits_equal_online_logits(source, model: Model, cache: TeacherCache, n_views: int) -> None:
    online = OnlineTargets(model, source.view_spec, CPU)
    seen = 0
    for epoch in range(3):
        for batch in make_batches(source, CachedTargets(cache, IDS, n_views, 7, CPU), n_views).epoch(epoch):
            computed = online.compute(batch.images, batch.image_rows, batch.view_ids, batch.ids).logits
            spacing = 2.0 ** (computed.abs().clamp_min(2.0**-14).log2().floor() - 10)
            assert ((batch.teacher.float() - computed).abs() <= 0.5 * spacing + 1e-5).all()
            seen += len(batch.ids)
    assert seen == 3 * len(IDS)


def test_the_online_teacher_computes_in_the_precision_of_the_run(source, model: Model) -> None:
    config = RunConfig(student="resnet8", epochs=1, views=VIEWS, precision="bf16")
    narrow = TeacherTargets(model=model).open(source, IDS, config, CPU)
    assert isinstance(narrow, OnlineTargets)
    wide = OnlineTargets(model, source.view_spec, CPU)
    batch = next(iter(make_batches(source, None).epoch(0)))
    found, expected = (
        targets.compute(batch.images, batch.image_rows, batch.view_ids, batch.ids).logits for targets in (narrow, wide)
    )
    assert (found.dtype, expected.dtype) == (torch.bfloat16, torch.float32)
    largest = expected.abs().max()
    assert 0 < (found.float() - expected).abs().max() < 0.03 * largest


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("n_views", [1, 2, VIEWS])
def test_resident_rows_are_those_of_the_windows(
    source, model: Model, cache: TeacherCache, tmp_path: Path, n_views: int, top_k: int | None
) -> None:
    if top_k is not None:
        build_cache(source, model, tmp_path / "c", ids=IDS, n_views=VIEWS, view_seed=7, top_k=TopK(top_k, 4.0))
        cache = TeacherCache.open(tmp_path / "c")
    windows = make_batches(source, CachedTargets(cache, IDS, n_views, 7, CPU), n_views)
    resident = make_batches(source, CachedTargets(cache, IDS, n_views, 7, CPU, resident=True), n_views)
    for a, b in zip(windows.epoch(1), resident.epoch(1), strict=True):
        assert torch.equal(a.index, b.index[:2])
        assert a.teacher_rows is None
        assert a.teacher.shape == (len(a.ids), 10)
        assert torch.equal(a.teacher, b.teacher[b.teacher_rows])


def test_logits_do_not_depend_on_the_window_size(source, cache: TeacherCache, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = [b.teacher for b in make_batches(source, CachedTargets(cache, IDS, VIEWS, 7, CPU)).epoch(1)]
    monkeypatch.setattr(targets_module, "WINDOW_BYTES", 30 * cache.classes * 2)
    small = [b.teacher for b in make_batches(source, CachedTargets(cache, IDS, VIEWS, 7, CPU)).epoch(1)]
    assert all(torch.equal(a, b) for a, b in zip(whole, small, strict=True))


def test_resumed_epoch_has_the_same_batches(source, cache: TeacherCache) -> None:
    whole = list(make_batches(source, CachedTargets(cache, IDS, VIEWS, 7, CPU)).epoch(2))
    rest = list(make_batches(source, CachedTargets(cache, IDS, VIEWS, 7, CPU)).epoch(2, first=5))
    assert len(rest) == len(whole) - 5
    for a, b in zip(whole[5:], rest, strict=True):
        assert torch.equal(a.ids, b.ids)
        assert torch.equal(a.view_ids, b.view_ids)
        assert torch.equal(a.teacher, b.teacher)


def test_epochs_contain_each_sample_once_and_its_views_evenly(source) -> None:
    run = make_batches(source, None)
    assert run.per_epoch == 8
    counts = np.zeros((len(IDS), source.view_spec.count), int)
    for epoch in range(VIEWS):
        ids = np.concatenate([b.ids.numpy() for b in run.epoch(epoch)])
        assert (ids == epoch_order(IDS, 3, epoch)).all()
        views = np.concatenate([b.view_ids.numpy() for b in run.epoch(epoch)])
        counts[np.searchsorted(IDS, ids), views] += 1
    assert (counts.max(1) == 1).all(), "each view of a sample occurs once in VIEWS epochs"
    assert (counts.sum(1) == VIEWS).all()


def test_batches_hold_the_images_of_their_samples(source) -> None:
    for batch in make_batches(source, None).epoch(0):
        assert batch.image_rows is not None
        assert (batch.images[batch.image_rows].numpy() == source.train.read(batch.ids.numpy())).all()
