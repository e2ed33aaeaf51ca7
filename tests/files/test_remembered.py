import dataclasses
import os

import pytest

from kdfast.files.remembered import combine_stamps, remembered, stamp_files

OLD = 1_000_000_000 * 10**9


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("KDFAST_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("kdfast.files.remembered._SETTLED_SECONDS", -1e9)  # the times of the tests' files are now
    return tmp_path / "cache"


@pytest.fixture
def files(tmp_path):
    paths = [str(tmp_path / name) for name in "ab"]
    for path in paths:
        with open(path, "wb") as file:
            file.write(b"content")
    return paths


@dataclasses.dataclass
class Files:
    """A split of files."""

    paths: list[str]

    def stamp(self):
        return stamp_files(self.paths, "how")


def counted(split, name="value"):
    """Return how often a value is computed when asked for once."""
    calls = []
    assert remembered(split, name, lambda: calls.append(1) or [1, 2]) == [1, 2]
    return len(calls)


def test_unchanged_files_are_read_once(files, folder):
    assert [counted(Files(files)) for _ in range(3)] == [1, 0, 0]
    assert counted(Files(files), "another") == 1
    assert counted(Files(files)) == 0
    assert len(list(folder.iterdir())) == 1


def rewrite(path, content):
    status = os.stat(path)
    with open(path, "wb") as file:
        file.write(content)
    return status


CHANGES = {
    "size": lambda paths: rewrite(paths[0], b"longer content"),
    "content, and size and time put back": lambda paths: os.utime(
        paths[0], ns=(rewrite(paths[0], b"CONTENT").st_mtime_ns,) * 2
    ),
    "time": lambda paths: os.utime(paths[1], ns=(OLD, OLD)),
    "order": lambda paths: paths.reverse(),
    "one more": lambda paths: paths.append(paths[0]),
    "one less": lambda paths: paths.pop(),
    "another path": lambda paths: (os.rename(paths[0], paths[0] + "2"), paths.insert(0, paths.pop(0) + "2")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_computes_again(files, change):
    assert counted(Files(files)) == 1
    CHANGES[change](files)
    assert counted(Files(files)) == 1


def test_how_the_files_are_read_matters(files):
    assert stamp_files(files, 1, b"x") == stamp_files(files, 1, b"x")
    assert len({stamp_files(files, *how) for how in [(1, b"x"), (1, b"y"), (2, b"x"), (None,), (), ("1", b"x")]}) == 6


def test_a_stamp_does_not_depend_on_the_current_folder(files, monkeypatch, tmp_path):
    first = stamp_files(files)
    monkeypatch.chdir(tmp_path)
    assert stamp_files(["a", "b"]) == first


def test_files_that_may_still_change_are_not_relied_on(files, monkeypatch, folder):
    monkeypatch.setattr("kdfast.files.remembered._SETTLED_SECONDS", 1.0)
    assert stamp_files(files) is None
    assert [counted(Files(files)) for _ in range(2)] == [1, 1]
    assert stamp_files([*files, "absent"]) is None
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"{}", b'{"value": [3, 4]}', b"\xff"])
def test_what_is_damaged_is_computed_again(files, folder, content):
    counted(Files(files))
    (kept,) = folder.iterdir()
    kept.write_bytes(content)
    assert [counted(Files(files)) for _ in range(2)] == [1, 0]


def test_a_folder_that_cannot_be_written_does_no_harm(files, folder):
    folder.write_bytes(b"a file")
    assert [counted(Files(files)) for _ in range(2)] == [1, 1]


def test_without_a_stamp_nothing_is_kept(folder):
    assert [counted(object()) for _ in range(2)] == [1, 1]
    assert not folder.exists()


def test_a_split_of_a_split_has_a_stamp_of_its_own(files):
    split = Files(files)
    assert combine_stamps(object(), b"x") is None
    assert len({split.stamp(), combine_stamps(split, b"x"), combine_stamps(split, b"y")}) == 3
