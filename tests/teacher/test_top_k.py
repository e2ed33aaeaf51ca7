"""Caches of the k most probable classes: content, use in the loss, and rejected combinations."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch

import kdfast
from kdfast.data.views import view_table
from kdfast.errors import CacheMismatch, DataError, UsageError
from kdfast.files import sha256_file, write_sealed
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.manifest import read_manifest
from kdfast.teacher.row_format import RowFormat, TopK
from kdfast.teacher.verify import verify_cache

SHARD_BYTES = 9 * (2 * 4 + 2) * 13  # 13 samples per shard: five shards for 60 samples
TEMPERATURES = (1.0, 2.0, 4.0)
IDS, VIEW_INDICES = np.arange(60)[::-1].copy(), np.arange(60) % 9


@pytest.fixture(scope="module")
def full(source, teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("top-k") / "full"
    build_cache(source, teacher, path, dtype="float32")
    return TeacherCache.open(path)


@pytest.fixture(scope="module")
def built(source, teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("top-k") / "two"
    build_cache(source, teacher, path, top_k=TopK(2, 3.0), shard_bytes=SHARD_BYTES)
    return path


def test_rows_hold_the_most_probable_classes_and_the_tail(source, teacher, full, built):
    cache = TeacherCache.open(built, source=source, teacher=teacher)
    assert len(list(built.glob("logits-*.npy"))) == 5
    assert cache.top_k == TopK(2, 3.0)
    assert cache.row_bytes == 10
    found = cache.lookup_top_k(IDS, VIEW_INDICES)
    logits = full.lookup(IDS, VIEW_INDICES)
    expected = kdfast.topk_teacher(logits, 2, 3.0)
    assert found.classes.dtype == torch.int32
    assert torch.equal(found.classes, expected.classes)
    torch.testing.assert_close(found.values.float(), expected.values, rtol=2**-10, atol=1e-3)
    assert found.tail.dtype == torch.float32
    torch.testing.assert_close(found.tail, expected.tail, rtol=2**-11, atol=1e-4)
    assert [len(part) for part in cache.lookup_top_k(IDS[:0], VIEW_INDICES[:0])] == [0, 0, 0]


@pytest.mark.parametrize(
    ("classes", "tails", "size"), [(1000, 1, 42), (1000, 3, 46), (1 << 16, 1, 42), (70_000, 1, 62)]
)
def test_bytes_of_a_row_of_ten_classes(classes, tails, size):
    assert RowFormat(classes, np.dtype("float16"), TopK(10, TEMPERATURES[:tails])).row_bytes == size


def test_class_ids_up_to_65535_survive():
    rows = RowFormat(1 << 16, np.dtype("float16"), TopK(2, 1.0))
    logits = np.zeros((1, 1 << 16), np.float32)
    logits[0, [65535, 40000]] = 9, 8
    assert rows.unpack(rows.pack(logits), 0).classes.tolist() == [[65535, 40000]]


@pytest.fixture(scope="module")
def several(source, teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("top-k") / "several"
    build_cache(source, teacher, path, top_k=TopK(2, (4.0, 1.0, 2.0)), n_views=3, dtype="float32")
    return TeacherCache.open(path, source=source, teacher=teacher)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_each_temperature_has_its_tail(full, several, temperature):
    indices = VIEW_INDICES % 3
    views = view_table(several.spec, 0, IDS, 3)[np.arange(60), indices]
    logits = full.lookup(IDS, views).double()
    found = several.lookup_top_k(IDS, indices, temperature)
    kept = (logits / temperature).exp().gather(1, found.classes.long()).sum(1)
    rest = (logits / temperature).exp().sum(1) - kept
    torch.testing.assert_close(found.tail.double().exp(), rest, rtol=1e-4, atol=1e-12)


def test_rejects_a_temperature_that_is_not_there(several):
    with pytest.raises(CacheMismatch, match=r"at temperature 1, 2, 4, but the run has 3: pass `temperature` one"):
        several.lookup_top_k(IDS, VIEW_INDICES % 3, 3.0)
    with pytest.raises(CacheMismatch, match="summed at temperature 1, 2, 4, but none is given"):
        several.lookup_top_k(IDS, VIEW_INDICES % 3)


def test_verify_checks_the_tails_of_every_temperature(source, teacher, several, tmp_path):
    assert verify_cache(several, source, teacher, samples=60).passed
    for column in range(3):
        copy = shutil.copytree(several.path, tmp_path / str(column))
        for path in copy.glob("logits-*.npy"):
            rows = np.load(path)
            rows["tail"][..., column] += 0.2
            np.save(path, rows)
        with pytest.raises(CacheMismatch, match="differ by up to"):
            verify_cache(TeacherCache.open(copy, check_files=False), source, teacher, samples=60)


def test_reads_caches_of_earlier_versions(source, teacher, built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "old")
    manifest = read_manifest(copy)
    manifest["top_k"] = {"k": 2, "temperature": 3.0}
    for path in sorted(copy.glob("logits-*.npy")):
        rows = np.load(path)
        old = np.empty(rows.shape, [("values", "<f2", (2,)), ("classes", "<i4", (2,)), ("tail", "<f4")])
        old["values"], old["classes"], old["tail"] = rows["values"], rows["classes"], rows["tail"][..., 0]
        np.save(path, old)
        manifest["files"][path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
    write_sealed(copy / "manifest.json", manifest)
    found = TeacherCache.open(copy, source=source, teacher=teacher).lookup_top_k(IDS, VIEW_INDICES, 3.0)
    new = TeacherCache.open(built).lookup_top_k(IDS, VIEW_INDICES)
    assert all(torch.equal(a, b) for a, b in zip(found, new, strict=True))


def test_rejects_a_manifest_without_temperature(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy")
    write_sealed(copy / "manifest.json", read_manifest(copy) | {"top_k": {"k": 2}})
    with pytest.raises(CacheMismatch, match="build the cache again"):
        TeacherCache.open(copy)


def test_rejects_tails_too_large_for_float16(source, teacher, tmp_path):
    with pytest.raises(DataError, match=r"divided by the temperature 1e-05 exceed 6.55e\+04.*`dtype` float32"):
        build_cache(source, teacher, tmp_path / "c", n_views=1, top_k=TopK(2, 1e-5))


def test_kd_loss_accepts_rows_and_is_a_lower_bound(full, built):
    z, y = torch.randn(60, 4), torch.arange(60) % 4
    options = {"alpha": 1.0, "temperature": 3.0, "reduction": "none"}
    kept = kdfast.kd_loss(z, y, TeacherCache.open(built).lookup_top_k(IDS, VIEW_INDICES), **options)
    whole = kdfast.kd_loss(z, y, full.lookup(IDS, VIEW_INDICES), **options)
    assert (kept <= 1.005 * whole + 5e-3).all()  # stored in float16
    assert (kept > 0.3 * whole).any()


def test_omitted_classes_share_their_mass_as_in_the_unaugmented_image(full, built):
    cache = TeacherCache.open(built)
    filled = cache.lookup_filled(IDS, VIEW_INDICES)
    assert (filled.shape, filled.dtype) == ((60, 4), torch.float32)
    logits, like = full.lookup(IDS, VIEW_INDICES), torch.from_numpy(full.identity_logits()[IDS])
    kept = torch.zeros(60, 4, dtype=torch.bool).scatter(1, logits.topk(2).indices, True)
    p, q, guess = ((x / 3.0).softmax(1) for x in (logits, filled, like))
    torch.testing.assert_close(q[kept], p[kept], rtol=2e-3, atol=0)  # stored in float16
    expected = (guess * ~kept) / (guess * ~kept).sum(1, keepdim=True) * (p * ~kept).sum(1, keepdim=True)
    torch.testing.assert_close(q[~kept], expected[~kept], rtol=2e-3, atol=0)
    unaugmented = cache.lookup_filled(IDS, np.full(60, cache.spec.identity))
    torch.testing.assert_close(unaugmented, like, rtol=2e-3, atol=5e-3)


def test_rows_are_filled_for_one_of_several_temperatures(several):
    views = VIEW_INDICES % 3
    found, filled = several.lookup_top_k(IDS, views, 2.0), several.lookup_filled(IDS, views, 2.0)
    mass = (filled / 2.0).exp().sum(1) - (filled / 2.0).exp().gather(1, found.classes.long()).sum(1)
    torch.testing.assert_close(mass, found.tail.exp(), rtol=1e-4, atol=1e-5)
    with pytest.raises(CacheMismatch, match="summed at temperature 1, 2, 4"):
        several.lookup_filled(IDS, views, 3.0)


def test_identity_logits_hold_all_classes(full, built):
    assert np.allclose(TeacherCache.open(built).identity_logits(), full.identity_logits(), atol=1e-4)


def test_rejects_the_lookup_of_the_other_format(full, built):
    with pytest.raises(CacheMismatch, match="2 most probable of 4 classes"):
        TeacherCache.open(built).lookup(IDS, VIEW_INDICES)
    with pytest.raises(CacheMismatch, match="holds all classes"):
        full.lookup_top_k(IDS, VIEW_INDICES)
    with pytest.raises(CacheMismatch, match="holds all classes"):
        full.lookup_filled(IDS, VIEW_INDICES)


@pytest.mark.parametrize("top_k", [TopK(0, 4.0), TopK(4, 4.0), TopK(2, 0.0), TopK(2, float("nan")), TopK(2, ())])
def test_rejects_options_out_of_range(source, teacher, tmp_path, top_k):
    with pytest.raises(UsageError):
        build_cache(source, teacher, tmp_path / "cache", top_k=top_k)


def test_does_not_resume_a_build_with_another_top_k(source, teacher, built):
    for top_k in (None, TopK(3, 3.0), TopK(2, 4.0), TopK(2, (3.0, 4.0))):
        with pytest.raises(CacheMismatch, match=r"top_k|per_shard"):
            build_cache(source, teacher, built, top_k=top_k, shard_bytes=SHARD_BYTES)
    assert build_cache(source, teacher, built, top_k=TopK(2, 3.0), shard_bytes=SHARD_BYTES).computed == 0


def test_does_not_confuse_top_k_caches_with_caches_of_all_classes(source, teacher, full, built):
    size = json.loads((built / "manifest.json").read_text())["per_shard"] * 9 * 4 * 2
    with pytest.raises(CacheMismatch, match="top_k"):
        build_cache(source, teacher, built, shard_bytes=size)
    with pytest.raises(CacheMismatch, match="top_k"):
        build_cache(source, teacher, full.path, dtype="float32", top_k=TopK(2, 3.0))


def test_verify_passes_and_detects_changes(source, teacher, built, tmp_path):
    assert verify_cache(TeacherCache.open(built), source, teacher, samples=60).passed
    for field, change in (("values", 0.5), ("tail", 0.2), ("classes", 1)):
        copy = shutil.copytree(built, tmp_path / field)
        for path in copy.glob("logits-*.npy"):
            rows = np.load(path)
            rows[field] = (rows[field] + change) % 4 if field == "classes" else rows[field] + change
            np.save(path, rows)
        with pytest.raises(CacheMismatch, match="differ by up to"):
            verify_cache(TeacherCache.open(copy, check_files=False), source, teacher, samples=60)


def test_rejects_a_shard_of_another_format(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy")
    path = next(iter(sorted(copy.glob("logits-*.npy"))))
    np.save(path, np.load(path)["values"])
    with pytest.raises(CacheMismatch, match="build the cache again"):
        TeacherCache.open(copy, check_files=False).lookup_top_k(np.arange(3), np.zeros(3, np.int64))
    assert json.loads((built / "manifest.json").read_text())["top_k"] == {"k": 2, "temperatures": [3.0]}
