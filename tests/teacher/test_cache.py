import copy
import dataclasses
import json
import shutil

import numpy as np
import psutil
import pytest
import torch

from kdfast.data.views import ViewSpec, apply_views, draw_view_indices, view_table
from kdfast.errors import CacheMismatch, DataError, Interrupted, OutputError, ShapeError, SubsetError, UsageError
from kdfast.nets import forward_with_features
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.verify import verify_cache

SHARD_BYTES = 9 * 4 * 2 * 13  # 13 samples per shard: five shards for 60 samples


def file_contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != "timing.json"}


def compute_directly(source, teacher, ids, views):
    """Compute logits and features in one batch with the eager network."""
    images = torch.from_numpy(source.train.read(ids))
    x = apply_views(images, views, source.view_spec, teacher.normalization, sample_ids=ids)
    with torch.no_grad():
        return forward_with_features(teacher.net, x)


@pytest.fixture(scope="module")
def full(source, teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "full"
    build_cache(source, teacher, path, shard_bytes=SHARD_BYTES)
    return path


@pytest.fixture
def copied(full, tmp_path):
    return shutil.copytree(full, tmp_path / "copy")


def test_holds_the_teachers_logits_for_every_view_of_every_sample(source, teacher, full):
    cache = TeacherCache.open(full, source=source, teacher=teacher)
    assert len(list(full.glob("logits-*.npy"))) == 5
    ids = np.arange(60)
    for view_index in range(9):
        views = np.full(60, view_index)
        got = cache.lookup(ids, views)
        expected, _ = compute_directly(source, teacher, ids, views)
        assert got.dtype == torch.float16
        assert expected.abs().max() > 1
        torch.testing.assert_close(got.float(), expected, rtol=2**-10, atol=1e-3)


def test_identity_logits_and_features_are_float32(source, teacher, full):
    cache = TeacherCache.open(full)
    expected, features = compute_directly(source, teacher, np.arange(60), np.full(60, source.view_spec.identity))
    assert cache.identity_logits().dtype == cache.features().dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(cache.identity_logits()), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(cache.features()), features, rtol=1e-5, atol=1e-4)
    assert (np.load(full / "logits-00000.npy")[4] == cache.identity_logits()[:13].astype(np.float16)).all()


def test_manifest_records_data_teacher_views_and_files(source, teacher, full):
    manifest = TeacherCache.open(full).manifest
    logits = TeacherCache.open(full).identity_logits()
    assert manifest["data"]["fingerprint"] == source.fingerprint
    assert manifest["teacher"]["digest"] == teacher.digest
    assert manifest["teacher"]["mean"] == [0.5, 0.4, 0.6]
    assert ViewSpec.from_dict(manifest["views"]["spec"]) == source.view_spec
    assert manifest["train_top1"] == pytest.approx(100 * (logits.argmax(1) == source.train.labels).mean())
    assert manifest["seconds"] > 0
    on_disk = {file.name for file in full.iterdir()} - {"manifest.json", "timing.json"}
    assert set(manifest["files"]) == on_disk


def test_lookup_of_random_rows_equals_array_indexing(full):
    cache = TeacherCache.open(full)
    stored = np.concatenate([np.load(file) for file in sorted(full.glob("logits-*.npy"))], axis=1)
    draw = np.random.default_rng(5)
    ids, view_indices = draw.integers(0, 60, 500), draw.integers(0, 9, 500)
    found = cache.lookup(ids, view_indices)
    assert found.dtype == torch.float16
    assert (found.numpy() == stored[view_indices, ids]).all()
    assert cache.lookup(ids[:0], view_indices[:0]).shape == (0, 4)


def test_subset_cache_covers_only_the_subset(source, teacher, full, tmp_path):
    ids = np.array([50, 3, 17, 4, 33])
    build_cache(source, teacher, tmp_path / "c", ids=ids, shard_bytes=SHARD_BYTES // 6)
    cache = TeacherCache.open(tmp_path / "c", source=source, teacher=teacher)
    assert cache.coverage.tolist() == [3, 4, 17, 33, 50]
    whole = TeacherCache.open(full)
    view_indices = np.array([8, 0, 2, 5, 4])
    torch.testing.assert_close(cache.lookup(ids, view_indices), whole.lookup(ids, view_indices), rtol=2**-9, atol=1e-3)
    cache.check_covers(ids)
    for bad in ([3, 4, 5], [-1, 3], [60], [0, 51, 52]):
        with pytest.raises(CacheMismatch, match=rf"lacks {len(set(bad) - set(ids))} of the samples"):
            cache.lookup(np.array(bad), np.zeros(len(bad), int))
    with pytest.raises(CacheMismatch, match="lacks 1 of the samples"):
        whole.check_covers(np.array([-1, 0]))


@pytest.mark.parametrize("n_views", [1, 2, 5])
def test_partial_cache_holds_the_columns_of_the_view_table(source, teacher, tmp_path, n_views):
    build_cache(source, teacher, tmp_path / "c", n_views=n_views, view_seed=7, dtype="float32")
    cache = TeacherCache.open(tmp_path / "c", source=source)
    ids = np.arange(60)
    table = view_table(source.view_spec, 7, ids, n_views)
    for view_index in range(n_views):
        expected, _ = compute_directly(source, teacher, ids, table[:, view_index])
        got = cache.lookup(ids, np.full(60, view_index))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_caches_random_crops(teacher, new_source, tmp_path):
    spec = ViewSpec(kind="crop", size=(6, 6), flip=True, crops=5, seed=3)
    source = new_source(views=spec)
    build_cache(source, teacher, tmp_path / "c", shard_bytes=500)
    cache = TeacherCache.open(tmp_path / "c", source=source)
    ids, views = np.arange(60), np.arange(60) % 5
    expected, _ = compute_directly(source, teacher, ids, views)
    torch.testing.assert_close(cache.lookup(ids, views).float(), expected, rtol=2**-10, atol=1e-3)


def test_full_cache_serves_every_run(source, teacher, full):
    cache = TeacherCache.open(full)
    ids = np.arange(0, 60, 2)
    for n_views, seed in [(1, 5), (4, 5), (8, 11), (9, 2)]:
        view_indices = draw_view_indices(0, 3, ids, n_views)
        views = view_table(source.view_spec, seed, ids, n_views)[np.arange(len(ids)), view_indices]
        cached = cache.translate_view_indices(ids, view_indices, n_views, seed)
        expected, _ = compute_directly(source, teacher, ids, views)
        torch.testing.assert_close(cache.lookup(ids, cached).float(), expected, rtol=2**-10, atol=1e-3)


def test_partial_cache_serves_runs_of_fewer_views_with_its_seed(source, teacher, tmp_path):
    build_cache(source, teacher, tmp_path / "c", n_views=3, view_seed=7)
    cache = TeacherCache.open(tmp_path / "c")
    ids, view_indices = np.arange(60), np.arange(60) % 2
    assert (cache.translate_view_indices(ids, view_indices, 2, 7) == view_indices).all()
    assert (cache.translate_view_indices(ids, 0 * view_indices, 1, 99) == 0).all()
    for n_views, seed in [(2, 8), (4, 7), (9, 7)]:
        with pytest.raises(CacheMismatch, match="holds 3 of 9 views"):
            cache.translate_view_indices(ids, view_indices, n_views, seed)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_detects_one_flipped_byte_in_any_file(copied, where):
    for file in sorted(copied.iterdir()):
        raw = file.read_bytes()
        at = round(where * (len(raw) - 1))
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(CacheMismatch, match="build"):
            TeacherCache.open(copied)
        file.write_bytes(raw)
    TeacherCache.open(copied)


def test_detects_a_change_of_any_manifest_byte(copied):
    file = copied / "manifest.json"
    raw = file.read_bytes()
    for at in range(0, len(raw), 7):
        for mask in (1, 0x2A):  # 0x2A turns a space into a line feed, which is valid JSON
            file.write_bytes(raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
            with pytest.raises(CacheMismatch):
                TeacherCache.open(copied, check_files=False)


def test_detects_missing_and_truncated_files(copied):
    shard = copied / "logits-00002.npy"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-2])
    with pytest.raises(CacheMismatch, match=r"logits-00002\.npy has \d+ bytes, expected"):
        TeacherCache.open(copied)
    shard.unlink()
    with pytest.raises(CacheMismatch, match=r"logits-00002\.npy cannot be read"):
        TeacherCache.open(copied)
    with pytest.raises(CacheMismatch, match="not a finished cache"):
        TeacherCache.open(copied / "nowhere")


def test_rejects_other_data_teachers_and_views(full, source, teacher, new_source, new_teacher):
    with pytest.raises(CacheMismatch, match=r"data\.fingerprint is"):
        TeacherCache.open(full, source=new_source(seed=1))
    with pytest.raises(CacheMismatch, match=r"teacher\.digest is"):
        TeacherCache.open(full, source=source, teacher=new_teacher(seed=1))
    with pytest.raises(CacheMismatch, match=r"views\.spec\.flip is false, expected true"):
        TeacherCache.open(full, source=new_source(views=ViewSpec(kind="shift", size=(8, 8), pad=1, flip=True)))
    with pytest.raises(CacheMismatch, match=r"data\.classes is 4, expected 5"):
        TeacherCache.open(full, source=dataclasses.replace(source, classes=tuple("01234")))
    other = copy.copy(teacher)
    other.normalization = type(teacher.normalization)((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    with pytest.raises(CacheMismatch, match=r"teacher\.mean is"):
        TeacherCache.open(full, teacher=other)


def test_checks_the_accuracy_of_the_cached_logits_against_the_labels(full, source, new_source):
    shuffled = new_source()
    shuffled.train.labels[:] = np.roll(source.train.labels, 1)
    shuffled.__dict__["fingerprint"] = source.fingerprint  # simulates a stored fingerprint that is out of date
    with pytest.raises(CacheMismatch, match="the labels have changed"):
        TeacherCache.open(full, source=shuffled)


def test_rejects_invalid_view_indices(full):
    cache = TeacherCache.open(full)
    ids = np.arange(3)
    for view_indices, words in [
        (np.array([0, 1]), "pass one per sample"),
        (np.array([0, 9, 1]), "the cache has 0 to 8"),
        (np.array([0, -1, 1]), "the cache has 0 to 8"),
    ]:
        with pytest.raises(ShapeError, match=words):
            cache.lookup(ids, view_indices)


def test_verify_recomputes_and_detects_changed_logits(full, copied, source, teacher, new_teacher):
    report = verify_cache(TeacherCache.open(full), source, teacher, samples=40)
    assert report.rows == 40
    assert report.agreement > 90
    assert 0 < report.largest_difference <= report.allowed
    for file in copied.glob("logits-*.npy"):
        logits = np.load(file)
        logits[:, ::3, 1] += np.float16(0.5)
        np.save(file, logits)
    with pytest.raises(CacheMismatch, match=r"differ by up to 0\.5"):
        verify_cache(TeacherCache.open(copied, check_files=False), source, teacher, samples=60)
    with pytest.raises(CacheMismatch, match=r"teacher\.digest"):
        verify_cache(TeacherCache.open(full), source, new_teacher(seed=1))


def test_bfloat16_arithmetic_is_recorded_and_approximate(source, teacher, full, tmp_path):
    build_cache(source, teacher, tmp_path / "c", precision="bfloat16")
    cache = TeacherCache.open(tmp_path / "c")
    assert cache.manifest["precision"] == "bfloat16"
    ids, view_indices = np.arange(60), np.arange(60) % 9
    exact, approximate = (
        TeacherCache.open(full).lookup(ids, view_indices).float(),
        cache.lookup(ids, view_indices).float(),
    )
    error = (exact - approximate).abs().max()
    assert 0.001 < error < 0.03 * exact.abs().max()
    assert (cache.identity_logits() == TeacherCache.open(full).identity_logits()).mean() > 0.5
    assert verify_cache(cache, source, teacher).passed


def test_memory_does_not_grow_with_the_rows_read(teacher, new_source, tmp_path):
    source = new_source(count=20_000, views=ViewSpec(kind="shift", size=(8, 8), pad=2, flip=True))
    folder = tmp_path / "c"
    build_cache(source, teacher, folder, ids=np.arange(200), dtype="float32")
    big = np.zeros((50, 200_000, 4), np.float32)  # 160 MB, replaces the single shard
    np.save(folder / "logits-00000.npy", big)
    del big
    cache = TeacherCache.open(folder, check_files=False)
    cache.n_views, cache.coverage, cache._per_shard, cache._covers_all = 50, np.arange(200_000), 200_000, True
    draw = np.random.default_rng(0)
    ids, view_indices = draw.integers(0, 200_000, 100_000), draw.integers(0, 50, 100_000)
    cache.lookup(ids[:10], view_indices[:10])
    before = psutil.Process().memory_info().rss
    cache.lookup(ids, view_indices)
    assert psutil.Process().memory_info().rss - before < 40e6


class TestBuild:
    def test_repeating_a_finished_build_changes_nothing(self, source, teacher, copied):
        before = {file.name: file.stat().st_mtime_ns for file in copied.iterdir()}
        again = build_cache(source, teacher, copied, shard_bytes=SHARD_BYTES)
        assert (again.complete, again.computed) == (True, 0)
        assert again.seconds > 0
        assert {file.name: file.stat().st_mtime_ns for file in copied.iterdir()} == before

    def test_rejects_a_folder_with_another_cache(self, source, teacher, copied, new_teacher):
        with pytest.raises(
            CacheMismatch,
            match=r"another plan: teacher\.digest is \"[0-9a-f]{12}\.\.\.\", expected \"[0-9a-f]{12}\.\.\.\"\.",
        ):
            build_cache(source, new_teacher(seed=1), copied, shard_bytes=SHARD_BYTES)
        with pytest.raises(CacheMismatch, match=r"dtype is .float16., expected .float32"):
            build_cache(source, teacher, copied, dtype="float32", shard_bytes=SHARD_BYTES)

    def test_does_not_overwrite_foreign_arrays(self, source, teacher, tmp_path):
        np.save(tmp_path / "features.npy", np.ones(3))
        with pytest.raises(OutputError, match=r"features\.npy, which is not part of a cache"):
            build_cache(source, teacher, tmp_path)
        assert np.load(tmp_path / "features.npy").tolist() == [1, 1, 1]

    @pytest.mark.parametrize(
        "name", ["config.json", "checkpoints/latest.json", "train.beton", "data.json", "notes.txt", "train/ant/0.png"]
    )
    def test_rejects_a_folder_with_foreign_files_and_leaves_it_unchanged(self, source, teacher, tmp_path, name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OutputError, match=f"holds {name.split('/')[0]}, which is not part of a cache") as caught:
            build_cache(source, teacher, tmp_path)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before
        assert (tmp_path / name).read_text() == "mine"

    def test_ignores_hidden_files_and_files_beside_a_cache(self, source, teacher, tmp_path):
        (tmp_path / ".directory").write_text("")
        (tmp_path / ".building" / "rank-0").mkdir(parents=True)  # killed before the plan was written
        assert build_cache(source, teacher, tmp_path, shard_bytes=SHARD_BYTES).computed == 5
        (tmp_path / "notes.txt").write_text("mine")
        assert build_cache(source, teacher, tmp_path, shard_bytes=SHARD_BYTES).complete

    def test_interrupted_build_resumes_after_its_finished_shards(self, source, teacher, full, tmp_path):
        def stop(done, total, note):
            assert total == 60 * 9
            if done > 2 * 13 * 9:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted, match="run the same command again to resume"):
            build_cache(source, teacher, tmp_path / "c", shard_bytes=SHARD_BYTES, progress=stop)
        with pytest.raises(CacheMismatch, match="not a finished cache"):
            TeacherCache.open(tmp_path / "c")
        with pytest.raises(CacheMismatch, match=r"with another plan: views\.view_seed is 0, expected 1"):
            build_cache(source, teacher, tmp_path / "c", shard_bytes=SHARD_BYTES, view_seed=1)
        seen = []
        result = build_cache(
            source,
            teacher,
            tmp_path / "c",
            shard_bytes=SHARD_BYTES,
            progress=lambda done, total, note: seen.append(done),
        )
        assert (result.computed, result.kept) == (3, 2)
        assert seen[-1] == 60 * 9
        assert file_contents(tmp_path / "c") == file_contents(full)
        assert not (tmp_path / "c" / ".building").exists()

    def test_resumed_build_recomputes_damaged_shards(self, source, teacher, full, tmp_path):
        def stop(done, total, note):
            if done > 3 * 13 * 9:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted):
            build_cache(source, teacher, tmp_path / "c", shard_bytes=SHARD_BYTES, progress=stop)
        shard = tmp_path / "c" / "logits-00001.npy"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        (tmp_path / "c" / ".building" / "shard-00002.json").write_text("{")
        result = build_cache(source, teacher, tmp_path / "c", shard_bytes=SHARD_BYTES)
        assert (result.computed, result.kept) == (4, 1)
        assert file_contents(tmp_path / "c") == file_contents(full)

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
    def test_ranks_share_the_shards_and_the_last_one_writes_the_manifest(self, source, teacher, full, tmp_path, order):
        results = [
            build_cache(source, teacher, tmp_path / "c", shard_bytes=SHARD_BYTES, rank=rank, world=3) for rank in order
        ]
        assert [result.complete for result in results] == [False, False, True]
        assert [result.computed for result in results] == [{0: 2, 1: 2, 2: 1}[rank] for rank in order]
        assert file_contents(tmp_path / "c") == file_contents(full)

    def test_rejects_a_folder_in_use(self, source, teacher, tmp_path):
        def intrude(done, total, note):
            with pytest.raises(OutputError, match="in use by process"):
                build_cache(source, teacher, tmp_path / "c")
            intruded.append(done)

        intruded = []
        assert build_cache(source, teacher, tmp_path / "c", progress=intrude).complete
        assert intruded

    def test_names_the_sample_whose_logits_are_not_finite_or_too_large(self, source, teacher, tmp_path, new_source):
        broken = copy.deepcopy(teacher)
        broken.net.fc.bias.data[1] = float("nan")
        with pytest.raises(DataError, match=r"training sample 0 are not finite"):
            build_cache(source, broken, tmp_path / "c")
        one = copy.deepcopy(teacher)
        dark = new_source()
        dark.train.images[37] = 255
        one.normalization = type(one.normalization)((1.0, 1.0, 1.0), (1e-4, 1e-4, 1e-4))
        dark.train.images[:37] = dark.train.images[38:] = 255
        one.net.fc.weight.data *= 1e3
        dark.train.images[41] = 0
        with pytest.raises(DataError, match=r"training sample 41 reach .* `dtype` float32"):
            build_cache(dark, one, tmp_path / "d", n_views=1)
        assert build_cache(dark, one, tmp_path / "d", n_views=1, dtype="float32").complete, (
            "the remedy in the message works"
        )

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"n_views": 0}, "0 views"),
            ({"n_views": 10}, "10 views per sample, but the data has 9"),
            ({"dtype": "float64"}, "`dtype` is 'float64'"),
            ({"precision": "int8"}, "`precision` is 'int8'"),
            ({"rank": 2, "world": 2}, "`rank` is 2 with `world` 2"),
        ],
    )
    def test_rejects_options_out_of_range(self, source, teacher, tmp_path, options, words):
        with pytest.raises(UsageError, match=words):
            build_cache(source, teacher, tmp_path / "c", **options)
        assert not (tmp_path / "c").exists()

    @pytest.mark.parametrize("ids", [[1, 1], [-1], [60], [], [0.5], [[1]], [True, False]])
    def test_rejects_invalid_sample_ids(self, source, teacher, tmp_path, ids):
        with pytest.raises(SubsetError):
            build_cache(source, teacher, tmp_path / "c", ids=np.array(ids))

    def test_rejects_a_teacher_with_another_number_of_classes(self, source, teacher, tmp_path):
        other = copy.copy(teacher)
        other.classes = 7
        with pytest.raises(CacheMismatch, match="has 7 classes"):
            build_cache(source, other, tmp_path / "c")

    def test_does_not_change_the_teacher(self, source, teacher, tmp_path):
        before, names = teacher.digest, [name for name, _ in teacher.net.named_modules()]
        build_cache(source, teacher, tmp_path / "c", n_views=2)
        assert teacher.digest == before
        assert [name for name, _ in teacher.net.named_modules()] == names

    def test_manifest_is_plain_json(self, full):
        fields = json.loads((full / "manifest.json").read_text())
        assert fields["format"] == "kdfast-cache"
