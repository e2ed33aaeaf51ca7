"""`kdfast report subsets`: a page about subsets without scores, and one line for what it cannot show."""

from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def subset(tmp_path: Path) -> Path:
    np.save(tmp_path / "half.npy", np.arange(60))
    return tmp_path / "half.npy"


def test_writes_a_page_about_subsets(kdfast, tiny: Path, subset: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    ran = kdfast("report", "subsets", subset, subset, "--data", tiny, "--each", 2, "--seed", 4, "--out", out)
    assert ran.code == 0, ran.err
    assert "half keeps 60, " in ran.out
    assert "of 120 samples" in ran.out
    assert "drawn at random (seed 4)" in out.read_text()
    again = kdfast("report", "subsets", subset, "--data", tiny, "--out", out)
    assert (again.code, "with --force" in again.err) == (4, True), again.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ((), 2, "Missing argument 'SUBSET...'"),
        (("missing.npy",), 3, "cannot read missing.npy"),
        (("far.npy",), 3, "past the end"),
        (("half.npy", "--each", 0), 2, "--each"),
    ],
)
def test_refuses(kdfast, tiny: Path, subset: Path, monkeypatch: pytest.MonkeyPatch, words, code, message) -> None:
    monkeypatch.chdir(subset.parent)
    np.save("far.npy", np.array([10**6]))
    ran = kdfast("report", "subsets", *words, "--data", tiny, "--out", "page.html")
    assert (ran.code, message in ran.err, ran.err.count("\n")) == (code, True, 1), ran.err
    assert not Path("page.html").exists()
