"""Parts of a cache in folders of their own, and their merger."""

import shutil

import numpy as np
import pytest

from kdfast.errors import CacheMismatch, UsageError
from kdfast.teacher.build import build_cache
from kdfast.teacher.cache import TeacherCache
from kdfast.teacher.row_format import TopK
from kdfast.teacher.writing.parts import merge_parts

SHARD = 72 * 4  # 15 shards of 60 samples on 9 views of 4 classes
SOME = np.arange(3, 50, 2)


def file_contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir() if file.is_file() and file.name != "timing.json"}


def build_parts(source, teacher, folder, world=3, ranks=None, **options):
    folders = []
    for rank in range(world) if ranks is None else ranks:
        folders.append(folder / f"part-{rank}-of-{world}")
        built = build_cache(
            source, teacher, folders[-1], rank=rank, world=world, part=True, shard_bytes=SHARD, **options
        )
        assert not built.complete
    return folders


@pytest.fixture(scope="module")
def parts(source, teacher, tmp_path_factory):
    return build_parts(source, teacher, tmp_path_factory.mktemp("parts"))


@pytest.fixture
def copies(parts, tmp_path):
    return [shutil.copytree(folder, tmp_path / folder.name) for folder in parts]


def modified(folders):
    """Return when each file and folder was last written."""
    return {path: path.stat().st_mtime_ns for folder in folders for path in [folder, *folder.rglob("*")]}


@pytest.mark.parametrize(
    "options",
    [{}, {"ids": SOME, "n_views": 4}, {"top_k": TopK(2, 4.0)}, {"kind": "features"}],
    ids=["all", "some", "top-k", "features"],
)
def test_the_merged_cache_has_the_bytes_of_one_process(source, teacher, tmp_path, options):
    build_cache(source, teacher, tmp_path / "one", shard_bytes=SHARD, **options)
    folders = build_parts(source, teacher, tmp_path, **options)
    before = modified(folders)
    merge_parts(folders[::-1], tmp_path / "merged")
    assert modified(folders) == before  # they may be read-only
    assert file_contents(tmp_path / "merged") == file_contents(tmp_path / "one")
    assert {p.name for p in (tmp_path / "merged").iterdir()} == {p.name for p in (tmp_path / "one").iterdir()}
    TeacherCache.open(tmp_path / "merged", source=source, teacher=teacher)
    merge_parts(folders, tmp_path / "merged")  # it is there already


@pytest.mark.parametrize("options", [{}, {"kind": "features"}, {"ids": SOME}])
def test_a_cache_of_one_shard_is_whole_in_one_part(source, teacher, tmp_path, options):
    build_cache(source, teacher, tmp_path / "one", **options)
    folders = [tmp_path / f"part-{rank}" for rank in range(3)]
    for rank, folder in enumerate(folders):
        build_cache(source, teacher, folder, rank=rank, world=3, part=True, **options)
    merge_parts(folders, tmp_path / "merged")
    assert file_contents(tmp_path / "merged") == file_contents(tmp_path / "one")
    merge_parts(folders, tmp_path / "merged")  # it is there already
    file = folders[0] / "logits-00000.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    refuse(folders, tmp_path / "again", f"{folders[0]} is damaged")


def test_parts_in_one_folder_are_whole_once_the_last_is_done(source, teacher, tmp_path):
    build_cache(source, teacher, tmp_path / "one", shard_bytes=SHARD)
    done = [
        build_cache(source, teacher, tmp_path / "all", rank=rank, world=3, part=True, shard_bytes=SHARD).complete
        for rank in (2, 0, 1)
    ]
    assert done == [False, False, True]
    assert file_contents(tmp_path / "all") == file_contents(tmp_path / "one")


def test_any_number_of_processes_resumes_what_others_have_begun(source, teacher, tmp_path):
    build_cache(source, teacher, tmp_path / "one", shard_bytes=SHARD)
    for rank, world in ((1, 3), (3, 4), (0, 2)):
        assert not build_cache(source, teacher, tmp_path / "all", rank=rank, world=world, shard_bytes=SHARD).complete
    assert build_cache(source, teacher, tmp_path / "all", rank=1, world=2, shard_bytes=SHARD).complete
    assert file_contents(tmp_path / "all") == file_contents(tmp_path / "one")


def test_a_merger_that_was_killed_resumes(source, teacher, parts, tmp_path):
    class Killed(Exception):
        pass

    def kill(done, total, note):
        if done == 3:
            raise Killed

    with pytest.raises(Killed):
        merge_parts(parts, tmp_path / "merged", progress=kill)
    merge_parts(parts, tmp_path / "merged")
    build_cache(source, teacher, tmp_path / "one", shard_bytes=SHARD)
    assert file_contents(tmp_path / "merged") == file_contents(tmp_path / "one")


def refuse(folders, out, match, error=CacheMismatch):
    with pytest.raises(error, match=match):
        merge_parts(folders, out)
    assert not (out / "manifest.json").exists()


def test_incomplete_and_foreign_parts_are_refused(source, teacher, new_teacher, copies, tmp_path):
    out = tmp_path / "merged"
    refuse(copies[:2], out, "of 3 parts, these are not given: 2/3")
    refuse([*copies, copies[1]], out, f"part 1/3 is in {copies[1]} and in {copies[1]}")
    assert not out.exists()
    refuse(copies, copies[0], "which is one of the parts", UsageError)
    other = build_parts(source, new_teacher(seed=1), tmp_path / "other", ranks=[2])
    refuse([*copies[:2], *other], out, "is a part of another cache than .*: teacher.digest is")
    division = build_parts(source, teacher, tmp_path / "division", world=2, ranks=[1])
    refuse([*copies[:2], *division], out, "holds part 0/3, and .* part 1/2: merge parts of one division")
    build_cache(source, teacher, tmp_path / "whole", shard_bytes=SHARD)
    refuse([tmp_path / "whole"], out, "is a whole cache")
    build_cache(source, new_teacher(seed=1), tmp_path / "other_whole", shard_bytes=SHARD)
    refuse([*copies, tmp_path / "other_whole"], out, "is a part of another cache than .*: teacher.digest is")
    refuse([*copies, tmp_path / "nowhere"], out, "not a finished cache")


def test_parts_of_another_kind_are_refused(source, teacher, copies, tmp_path):
    other = build_parts(source, teacher, tmp_path / "other", ranks=[2], kind="features")
    refuse(
        [*copies[:2], *other], tmp_path / "merged", 'is a part of another cache than .*: kind is "features", expected'
    )


@pytest.mark.parametrize(
    ("options", "name"), [({"ids": SOME}, "coverage.npy"), ({"kind": "features"}, "classifier.npy")]
)
def test_a_damaged_array_of_the_whole_cache_is_refused(source, teacher, tmp_path, options, name):
    folders = build_parts(source, teacher, tmp_path, world=2, **options)
    file = folders[0] / name
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    refuse(folders, tmp_path / "merged", f"{file} is missing or damaged: run its kdfast cache --shard command again")
    build_parts(source, teacher, tmp_path, world=2, ranks=[0], **options)
    merge_parts(folders, tmp_path / "merged")
    TeacherCache.open(tmp_path / "merged", source=source, teacher=teacher)


def test_damaged_and_unfinished_parts_are_refused(copies, tmp_path):
    file = copies[1] / "logits-00001.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    refuse(copies, tmp_path / "merged", f"shard 1 in {copies[1]} is missing or damaged")
    file.unlink()
    refuse(copies, tmp_path / "merged", f"shard 1 in {copies[1]} is missing or damaged")
    next(copies[1].glob(".building/part-*.json")).unlink()
    refuse(copies, tmp_path / "merged", f"{copies[1]} holds no finished part")
