"""Caches of the most probable classes: what they hold, whom they serve, and whom they refuse."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import kdfast
from kdfast.errors import CacheMismatch, UsageError
from kdfast.teacher.cache import TeacherCache, build_cache
from kdfast.teacher.rows import TopK

SMALL = 9 * (2 * 6 + 4) * 13  # thirteen samples a shard: five shards for sixty samples
IDS, SLOTS = np.arange(60)[::-1].copy(), np.arange(60) % 9


@pytest.fixture(scope="module")
def full(source, teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("top-k") / "full"
    build_cache(source, teacher, path, dtype="float32")
    return TeacherCache.open(path)


@pytest.fixture(scope="module")
def built(source, teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("top-k") / "two"
    build_cache(source, teacher, path, top_k=TopK(2, 3.0), shard_bytes=SMALL)
    return path


def test_rows_are_the_most_probable_classes_and_the_rest(source, teacher, full, built):
    cache = TeacherCache.open(built, source=source, teacher=teacher)
    assert len(list(built.glob("logits-*.npy"))) == 5
    assert cache.top_k == TopK(2, 3.0)
    assert cache.row_bytes == 16
    found = cache.lookup_top_k(IDS, SLOTS)
    logits = full.lookup(IDS, SLOTS)
    expected = kdfast.topk_teacher(logits, 2, 3.0)
    assert found.classes.dtype == torch.int32
    assert torch.equal(found.classes, expected.classes)
    torch.testing.assert_close(found.values.float(), expected.values, rtol=2**-10, atol=1e-3)
    torch.testing.assert_close(found.tail, expected.tail, rtol=1e-5, atol=1e-4)


def test_the_loss_takes_them_and_is_a_lower_bound(full, built):
    z, y = torch.randn(60, 4), torch.arange(60) % 4
    options = {"alpha": 1.0, "temperature": 3.0, "reduction": "none"}
    kept = kdfast.kd_loss(z, y, TeacherCache.open(built).lookup_top_k(IDS, SLOTS), **options)
    whole = kdfast.kd_loss(z, y, full.lookup(IDS, SLOTS), **options)
    assert (kept <= 1.005 * whole + 5e-3).all()  # stored in float16
    assert (kept > 0.3 * whole).any()


def test_scores_find_all_classes_of_the_identity_view(full, built):
    assert np.allclose(TeacherCache.open(built).identity_logits(), full.identity_logits(), atol=1e-4)


def test_whole_rows_are_refused(full, built):
    with pytest.raises(CacheMismatch, match="2 most probable of 4 classes"):
        TeacherCache.open(built).lookup(IDS, SLOTS)
    with pytest.raises(CacheMismatch, match="holds all classes"):
        full.lookup_top_k(IDS, SLOTS)


@pytest.mark.parametrize("top_k", [TopK(0, 4.0), TopK(4, 4.0), TopK(2, 0.0), TopK(2, float("nan"))])
def test_options_that_make_no_sense(source, teacher, tmp_path, top_k):
    with pytest.raises(UsageError):
        build_cache(source, teacher, tmp_path / "cache", top_k=top_k)


def test_a_build_of_another_form_does_not_go_on(source, teacher, built):
    for top_k in (None, TopK(3, 3.0), TopK(2, 4.0)):
        with pytest.raises(CacheMismatch, match=r"top_k|per_shard"):
            build_cache(source, teacher, built, top_k=top_k, shard_bytes=SMALL)
    assert build_cache(source, teacher, built, top_k=TopK(2, 3.0), shard_bytes=SMALL).computed == 0


def test_a_whole_cache_is_not_taken_for_it_nor_it_for_a_whole_one(source, teacher, full, built):
    size = json.loads((built / "manifest.json").read_text())["per_shard"] * 9 * 4 * 2
    with pytest.raises(CacheMismatch, match="top_k"):
        build_cache(source, teacher, built, shard_bytes=size)
    with pytest.raises(CacheMismatch, match="top_k"):
        build_cache(source, teacher, full.path, dtype="float32", top_k=TopK(2, 3.0))


def test_verify_accepts_it_and_notices_changes(source, teacher, built, tmp_path):
    assert TeacherCache.open(built).verify(source, teacher, samples=60).passed
    for field, change in (("values", 0.5), ("tail", 0.2), ("classes", 1)):
        copy = shutil.copytree(built, tmp_path / field)
        for path in copy.glob("logits-*.npy"):
            rows = np.load(path)
            rows[field] = (rows[field] + change) % 4 if field == "classes" else rows[field] + change
            np.save(path, rows)
        with pytest.raises(CacheMismatch, match="differ by up to"):
            TeacherCache.open(copy, check_files=False).verify(source, teacher, samples=60)


def test_a_shard_of_another_form_is_refused(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy")
    path = next(iter(sorted(copy.glob("logits-*.npy"))))
    np.save(path, np.load(path)["values"])
    with pytest.raises(CacheMismatch, match="build the cache again"):
        TeacherCache.open(copy, check_files=False).lookup_top_k(np.arange(3), np.zeros(3, np.int64))
    assert json.loads((built / "manifest.json").read_text())["top_k"] == {"k": 2, "temperature": 3.0}
