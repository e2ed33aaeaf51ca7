import copy
import json
import shutil

import numpy as np
import psutil
import pytest
import torch

from kdfast.data.views import ViewSpec, apply_views, draw_slots, view_table
from kdfast.errors import CacheMismatch, DataError, Interrupted, OutputError, ShapeError, SubsetError, UsageError
from kdfast.nets import logits_and_features
from kdfast.teacher.cache import TeacherCache, build_cache

SMALL = 9 * 4 * 2 * 13  # thirteen samples a shard: five shards for sixty samples


def read_all(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != "timing.json"}


def direct(source, teacher, ids, views):
    """Logits and features computed plainly: one batch, eager network."""
    images = torch.from_numpy(source.train.read(ids))
    x = apply_views(images, views, source.views, teacher.normalization, sample_ids=ids)
    with torch.no_grad():
        return logits_and_features(teacher.net, x)


@pytest.fixture(scope="module")
def full(source, teacher, tmp_path_factory):
    path = tmp_path_factory.mktemp("cache") / "full"
    build_cache(source, teacher, path, shard_bytes=SMALL)
    return path


@pytest.fixture
def copied(full, tmp_path):
    return shutil.copytree(full, tmp_path / "copy")


def test_every_view_of_every_sample_is_the_teachers_answer(source, teacher, full):
    cache = TeacherCache.open(full, source=source, teacher=teacher)
    assert len(list(full.glob("logits-*.npy"))) == 5
    ids = np.arange(60)
    for slot in range(9):
        views = np.full(60, slot)
        got = cache.lookup(ids, views)
        expected, _ = direct(source, teacher, ids, views)
        assert got.dtype == torch.float16
        assert expected.abs().max() > 1
        torch.testing.assert_close(got.float(), expected, rtol=2**-10, atol=1e-3)


def test_identity_logits_and_features_are_float32(source, teacher, full):
    cache = TeacherCache.open(full)
    expected, features = direct(source, teacher, np.arange(60), np.full(60, source.views.identity))
    assert cache.identity_logits().dtype == cache.features().dtype == np.float32
    torch.testing.assert_close(torch.from_numpy(cache.identity_logits()), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(torch.from_numpy(cache.features()), features, rtol=1e-5, atol=1e-4)
    assert (np.load(full / "logits-00000.npy")[4] == cache.identity_logits()[:13].astype(np.float16)).all()


def test_the_manifest_says_what_the_cache_is(source, teacher, full):
    manifest = TeacherCache.open(full).manifest
    logits = TeacherCache.open(full).identity_logits()
    assert manifest["data"]["fingerprint"] == source.fingerprint
    assert manifest["teacher"]["digest"] == teacher.digest
    assert manifest["teacher"]["mean"] == [0.5, 0.4, 0.6]
    assert ViewSpec.from_dict(manifest["views"]["spec"]) == source.views
    assert manifest["train_top1"] == pytest.approx(100 * (logits.argmax(1) == source.train.labels).mean())
    assert manifest["seconds"] > 0
    on_disk = {file.name for file in full.iterdir()} - {"manifest.json", "timing.json"}
    assert set(manifest["files"]) == on_disk


def test_lookup_of_random_rows_equals_indexing(full):
    cache = TeacherCache.open(full)
    stored = np.concatenate([np.load(file) for file in sorted(full.glob("logits-*.npy"))], axis=1)
    draw = np.random.default_rng(5)
    ids, slots = draw.integers(0, 60, 500), draw.integers(0, 9, 500)
    out = torch.empty(500, 4, dtype=torch.float16)
    assert cache.lookup(ids, slots, out=out) is out
    assert (out.numpy() == stored[slots, ids]).all()
    assert cache.lookup(ids[:0], slots[:0]).shape == (0, 4)


def test_a_subset_is_covered_and_nothing_else(source, teacher, full, tmp_path):
    ids = np.array([50, 3, 17, 4, 33])
    build_cache(source, teacher, tmp_path / "c", ids=ids, shard_bytes=SMALL // 6)
    cache = TeacherCache.open(tmp_path / "c", source=source, teacher=teacher)
    assert cache.coverage.tolist() == [3, 4, 17, 33, 50]
    whole = TeacherCache.open(full)
    slots = np.array([8, 0, 2, 5, 4])
    torch.testing.assert_close(cache.lookup(ids, slots), whole.lookup(ids, slots), rtol=2**-9, atol=1e-3)
    cache.require(ids)
    for bad in ([3, 4, 5], [-1, 3], [60], [0, 51, 52]):
        with pytest.raises(CacheMismatch, match=rf"lacks {len(set(bad) - set(ids))} of the samples"):
            cache.lookup(np.array(bad), np.zeros(len(bad), int))
    with pytest.raises(CacheMismatch, match="lacks 1 of the samples"):
        whole.require(np.array([-1, 0]))


@pytest.mark.parametrize("n_views", [1, 2, 5])
def test_fewer_views_hold_the_columns_of_the_view_table(source, teacher, tmp_path, n_views):
    build_cache(source, teacher, tmp_path / "c", n_views=n_views, view_seed=7, dtype="float32")
    cache = TeacherCache.open(tmp_path / "c", source=source)
    ids = np.arange(60)
    table = view_table(source.views, 7, ids, n_views)
    for slot in range(n_views):
        expected, _ = direct(source, teacher, ids, table[:, slot])
        got = cache.lookup(ids, np.full(60, slot))
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_random_crops_are_cached_too(teacher, new_source, tmp_path):
    spec = ViewSpec(kind="crop", size=(6, 6), flip=True, crops=5, seed=3)
    source = new_source(views=spec)
    build_cache(source, teacher, tmp_path / "c", shard_bytes=500)
    cache = TeacherCache.open(tmp_path / "c", source=source)
    ids, views = np.arange(60), np.arange(60) % 5
    expected, _ = direct(source, teacher, ids, views)
    torch.testing.assert_close(cache.lookup(ids, views).float(), expected, rtol=2**-10, atol=1e-3)


def test_a_full_cache_serves_every_run(source, teacher, full):
    cache = TeacherCache.open(full)
    ids = np.arange(0, 60, 2)
    for n_views, seed in [(1, 5), (4, 5), (8, 11), (9, 2)]:
        slots = draw_slots(0, 3, ids, n_views)
        views = view_table(source.views, seed, ids, n_views)[np.arange(len(ids)), slots]
        columns = cache.slots_for(ids, slots, n_views, seed)
        expected, _ = direct(source, teacher, ids, views)
        torch.testing.assert_close(cache.lookup(ids, columns).float(), expected, rtol=2**-10, atol=1e-3)


def test_a_partial_cache_serves_fewer_views_of_its_own_seed(source, teacher, tmp_path):
    build_cache(source, teacher, tmp_path / "c", n_views=3, view_seed=7)
    cache = TeacherCache.open(tmp_path / "c")
    ids, slots = np.arange(60), np.arange(60) % 2
    assert (cache.slots_for(ids, slots, 2, 7) == slots).all()
    assert (cache.slots_for(ids, 0 * slots, 1, 99) == 0).all()
    for n_views, seed in [(2, 8), (4, 7), (9, 7)]:
        with pytest.raises(CacheMismatch, match="holds 3 of 9 views"):
            cache.slots_for(ids, slots, n_views, seed)


@pytest.mark.parametrize("where", [0.0, 0.3, 0.7, 1.0])
def test_one_flipped_byte_of_any_file_is_noticed(copied, where):
    for file in sorted(copied.iterdir()):
        raw = file.read_bytes()
        at = round(where * (len(raw) - 1))
        file.write_bytes(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
        with pytest.raises(CacheMismatch, match="build"):
            TeacherCache.open(copied)
        file.write_bytes(raw)
    TeacherCache.open(copied)


def test_every_byte_of_the_manifest_counts(copied):
    file = copied / "manifest.json"
    raw = file.read_bytes()
    for at in range(0, len(raw), 7):
        for mask in (1, 0x2A):  # 0x2A turns a blank into a line feed, which JSON would not mind
            file.write_bytes(raw[:at] + bytes([raw[at] ^ mask]) + raw[at + 1 :])
            with pytest.raises(CacheMismatch):
                TeacherCache.open(copied, check_files=False)


def test_missing_and_shortened_files_are_noticed(copied):
    shard = copied / "logits-00002.npy"
    raw = shard.read_bytes()
    shard.write_bytes(raw[:-2])
    with pytest.raises(CacheMismatch, match=r"logits-00002\.npy has \d+ bytes, needed"):
        TeacherCache.open(copied)
    shard.unlink()
    with pytest.raises(CacheMismatch, match=r"logits-00002\.npy cannot be read"):
        TeacherCache.open(copied)
    with pytest.raises(CacheMismatch, match="no finished cache"):
        TeacherCache.open(copied / "nowhere")


def test_caches_of_other_data_teachers_and_views_are_refused(full, source, teacher, new_source, new_teacher):
    with pytest.raises(CacheMismatch, match=r"data\.fingerprint is"):
        TeacherCache.open(full, source=new_source(seed=1))
    with pytest.raises(CacheMismatch, match=r"teacher\.digest is"):
        TeacherCache.open(full, source=source, teacher=new_teacher(seed=1))
    with pytest.raises(CacheMismatch, match=r"views\.spec\.flip is false, needed true"):
        TeacherCache.open(full, views=ViewSpec(kind="shift", size=(8, 8), pad=1, flip=True))
    with pytest.raises(CacheMismatch, match=r"data\.classes is 4, needed 5"):
        TeacherCache.open(full, classes=5)
    other = copy.copy(teacher)
    other.normalization = type(teacher.normalization)((0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    with pytest.raises(CacheMismatch, match=r"teacher\.mean is"):
        TeacherCache.open(full, teacher=other)


def test_the_accuracy_of_the_cached_logits_is_checked_against_the_labels(full, source, new_source):
    shuffled = new_source()
    shuffled.train.labels[:] = np.roll(source.train.labels, 1)
    shuffled.__dict__["fingerprint"] = source.fingerprint  # as if a record vouched for the files
    with pytest.raises(CacheMismatch, match="the labels have changed"):
        TeacherCache.open(full, source=shuffled)


def test_lookups_that_do_not_fit_are_refused(full):
    cache = TeacherCache.open(full)
    ids = np.arange(3)
    for slots, out, words in [
        (np.array([0, 1]), None, "one slot for each sample"),
        (np.array([0, 9, 1]), None, "the slots 0 to 8"),
        (np.array([0, -1, 1]), None, "the slots 0 to 8"),
        (ids, torch.empty(3, 4), "float16 on the CPU"),
        (ids, torch.empty(2, 4, dtype=torch.float16), "out is"),
    ]:
        with pytest.raises(ShapeError, match=words):
            cache.lookup(ids, slots, out=out)


def test_verify_recomputes_and_notices_a_changed_logit(full, copied, source, teacher, new_teacher):
    report = TeacherCache.open(full).verify(source, teacher, samples=40)
    assert report.rows == 40
    assert report.agreement > 90
    assert 0 < report.largest_difference <= report.allowed
    for file in copied.glob("logits-*.npy"):
        logits = np.load(file)
        logits[:, ::3, 1] += np.float16(0.5)
        np.save(file, logits)
    with pytest.raises(CacheMismatch, match=r"differ by up to 0\.5"):
        TeacherCache.open(copied, check_files=False).verify(source, teacher, samples=60)
    with pytest.raises(CacheMismatch, match=r"teacher\.digest"):
        TeacherCache.open(full).verify(source, new_teacher(seed=1))


def test_bfloat16_arithmetic_is_recorded_and_close(source, teacher, full, tmp_path):
    build_cache(source, teacher, tmp_path / "c", precision="bfloat16")
    cache = TeacherCache.open(tmp_path / "c")
    assert cache.manifest["precision"] == "bfloat16"
    ids, slots = np.arange(60), np.arange(60) % 9
    exact, rough = TeacherCache.open(full).lookup(ids, slots).float(), cache.lookup(ids, slots).float()
    error = (exact - rough).abs().max()
    assert 0.001 < error < 0.03 * exact.abs().max()
    assert (cache.identity_logits() == TeacherCache.open(full).identity_logits()).mean() > 0.5
    assert cache.verify(source, teacher).passed


def test_memory_does_not_grow_with_what_is_read(teacher, new_source, tmp_path):
    source = new_source(count=20_000, views=ViewSpec(kind="shift", size=(8, 8), pad=2, flip=True))
    folder = tmp_path / "c"
    build_cache(source, teacher, folder, ids=np.arange(200), dtype="float32")
    big = np.zeros((50, 200_000, 4), np.float32)  # 160 MB in place of the one shard
    np.save(folder / "logits-00000.npy", big)
    del big
    cache = TeacherCache.open(folder, check_files=False)
    cache.n_views, cache.coverage, cache._per_shard, cache._whole = 50, np.arange(200_000), 200_000, True
    draw = np.random.default_rng(0)
    ids, slots = draw.integers(0, 200_000, 100_000), draw.integers(0, 50, 100_000)
    cache.lookup(ids[:10], slots[:10])
    before = psutil.Process().memory_info().rss
    cache.lookup(ids, slots)
    assert psutil.Process().memory_info().rss - before < 40e6


class TestBuild:
    def test_the_same_call_again_changes_nothing(self, source, teacher, copied):
        before = {file.name: file.stat().st_mtime_ns for file in copied.iterdir()}
        again = build_cache(source, teacher, copied, shard_bytes=SMALL)
        assert (again.complete, again.computed) == (True, 0)
        assert again.seconds > 0
        assert {file.name: file.stat().st_mtime_ns for file in copied.iterdir()} == before

    def test_another_cache_in_the_folder_is_refused(self, source, teacher, copied, new_teacher):
        with pytest.raises(CacheMismatch, match=r"finished cache made otherwise: teacher\.digest"):
            build_cache(source, new_teacher(seed=1), copied, shard_bytes=SMALL)
        with pytest.raises(CacheMismatch, match=r"dtype is .float16., needed .float32"):
            build_cache(source, teacher, copied, dtype="float32", shard_bytes=SMALL)

    def test_other_peoples_arrays_are_not_overwritten(self, source, teacher, tmp_path):
        np.save(tmp_path / "features.npy", np.ones(3))
        with pytest.raises(OutputError, match=r"features\.npy of something else"):
            build_cache(source, teacher, tmp_path)
        assert np.load(tmp_path / "features.npy").tolist() == [1, 1, 1]

    @pytest.mark.parametrize(
        "name", ["config.json", "checkpoints/latest.json", "train.beton", "data.json", "notes.txt", "train/ant/0.png"]
    )
    def test_a_folder_of_something_else_is_refused_untouched(self, source, teacher, tmp_path, name):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(OutputError, match=f"holds {name.split('/')[0]} of something else") as caught:
            build_cache(source, teacher, tmp_path)
        assert "\n" not in str(caught.value)
        assert sorted(tmp_path.rglob("*")) == before
        assert (tmp_path / name).read_text() == "mine"

    def test_hidden_files_and_notes_beside_a_cache_do_not_matter(self, source, teacher, tmp_path):
        (tmp_path / ".directory").write_text("")
        (tmp_path / ".building" / "rank-0").mkdir(parents=True)  # killed before it had a plan
        assert build_cache(source, teacher, tmp_path, shard_bytes=SMALL).computed == 5
        (tmp_path / "notes.txt").write_text("mine")
        assert build_cache(source, teacher, tmp_path, shard_bytes=SMALL).complete

    def test_an_interrupted_build_resumes_after_its_shards(self, source, teacher, full, tmp_path):
        def stop(done, total, note):
            assert total == 60 * 9
            if done > 2 * 13 * 9:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted, match="the same command resumes"):
            build_cache(source, teacher, tmp_path / "c", shard_bytes=SMALL, progress=stop)
        with pytest.raises(CacheMismatch, match="no finished cache"):
            TeacherCache.open(tmp_path / "c")
        with pytest.raises(CacheMismatch, match=r"unfinished cache made otherwise: views\.view_seed is 0, needed 1"):
            build_cache(source, teacher, tmp_path / "c", shard_bytes=SMALL, view_seed=1)
        seen = []
        result = build_cache(
            source, teacher, tmp_path / "c", shard_bytes=SMALL, progress=lambda done, total, note: seen.append(done)
        )
        assert (result.computed, result.kept) == (3, 2)
        assert seen[-1] == 60 * 9
        assert read_all(tmp_path / "c") == read_all(full)
        assert not (tmp_path / "c" / ".building").exists()

    def test_a_damaged_shard_of_an_unfinished_build_is_computed_again(self, source, teacher, full, tmp_path):
        def stop(done, total, note):
            if done > 3 * 13 * 9:
                raise KeyboardInterrupt

        with pytest.raises(Interrupted):
            build_cache(source, teacher, tmp_path / "c", shard_bytes=SMALL, progress=stop)
        shard = tmp_path / "c" / "logits-00001.npy"
        shard.write_bytes(shard.read_bytes()[:-1] + b"?")
        (tmp_path / "c" / ".building" / "shard-00002.json").write_text("{")
        result = build_cache(source, teacher, tmp_path / "c", shard_bytes=SMALL)
        assert (result.computed, result.kept) == (4, 1)
        assert read_all(tmp_path / "c") == read_all(full)

    @pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
    def test_ranks_share_the_work_and_the_last_one_finishes(self, source, teacher, full, tmp_path, order):
        results = [
            build_cache(source, teacher, tmp_path / "c", shard_bytes=SMALL, rank=rank, world=3) for rank in order
        ]
        assert [result.complete for result in results] == [False, False, True]
        assert [result.computed for result in results] == [{0: 2, 1: 2, 2: 1}[rank] for rank in order]
        assert read_all(tmp_path / "c") == read_all(full)

    def test_a_folder_being_built_in_is_refused(self, source, teacher, tmp_path):
        def intrude(done, total, note):
            with pytest.raises(OutputError, match="in use by process"):
                build_cache(source, teacher, tmp_path / "c")
            intruded.append(done)

        intruded = []
        assert build_cache(source, teacher, tmp_path / "c", progress=intrude).complete
        assert intruded

    def test_logits_that_are_not_finite_name_the_sample(self, source, teacher, tmp_path, new_source):
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
        with pytest.raises(DataError, match=r"training sample 41 reach .* dtype float32"):
            build_cache(dark, one, tmp_path / "d", n_views=1)
        assert build_cache(dark, one, tmp_path / "d", n_views=1, dtype="float32").complete, "as the message advises"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"n_views": 0}, "0 views"),
            ({"n_views": 10}, "10 views per sample: this data has 9"),
            ({"dtype": "float64"}, "dtype 'float64'"),
            ({"precision": "int8"}, "precision 'int8'"),
            ({"rank": 2, "world": 2}, "rank 2 of 2"),
        ],
    )
    def test_options_that_make_no_sense(self, source, teacher, tmp_path, options, words):
        with pytest.raises(UsageError, match=words):
            build_cache(source, teacher, tmp_path / "c", **options)
        assert not (tmp_path / "c").exists()

    @pytest.mark.parametrize("ids", [[1, 1], [-1], [60], [], [0.5], [[1]], [True, False]])
    def test_ids_that_are_no_samples(self, source, teacher, tmp_path, ids):
        with pytest.raises(SubsetError):
            build_cache(source, teacher, tmp_path / "c", ids=np.array(ids))

    def test_a_teacher_of_other_classes_is_refused(self, source, teacher, tmp_path):
        other = copy.copy(teacher)
        other.classes = 7
        with pytest.raises(CacheMismatch, match="knows 7 classes"):
            build_cache(source, other, tmp_path / "c")

    def test_the_teacher_is_left_as_it_was(self, source, teacher, tmp_path):
        before, names = teacher.digest, [name for name, _ in teacher.net.named_modules()]
        build_cache(source, teacher, tmp_path / "c", n_views=2)
        assert teacher.digest == before
        assert [name for name, _ in teacher.net.named_modules()] == names

    def test_the_manifest_is_plain_json(self, full):
        fields = json.loads((full / "manifest.json").read_text())
        assert fields["format"] == "kdfast-cache"
