"""Disk space: what does not fit is refused, what is already written counts."""

import shutil
from pathlib import Path

import pytest

from kdfast.errors import OutputError
from kdfast.files.space import check_space, format_bytes, free_space, used_space


@pytest.fixture
def small_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2000, 1000, 1000))


@pytest.mark.usefixtures("small_disk")
def test_refuses_what_does_not_fit(tmp_path: Path) -> None:
    out = tmp_path / "new" / "deeper"
    check_space(out, 1000, "the cache")
    with pytest.raises(OutputError, match=r"the cache takes about 1 kB, and .*deeper has 1 kB free: free space"):
        check_space(out, 1001, "the cache")
    out.mkdir(parents=True)
    (out / "part").write_bytes(bytes(500))
    check_space(out, 1500, "the cache")


def test_looks_at_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_space(tmp_path / "a" / "b") == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.1)


def test_counts_all_files_below(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(bytes(7))
    (tmp_path / "y").write_bytes(bytes(5))
    assert (used_space(tmp_path), used_space(tmp_path / "none")) == (12, 0)


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 bytes"), (1500, "1.5 kB"), (26_000_000, "26 MB"), (1.25e12, "1.25 TB")]
)
def test_sizes_are_short(count: float, text: str) -> None:
    assert format_bytes(count) == text
