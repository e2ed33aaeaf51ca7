"""`kdfast reproduce`: the theorem, and the page of a study."""

from pathlib import Path

import pytest

STUDY = """
title: One network on all data
source: A paper
recipe: {epochs: 1}
cells:
  - {fraction: 1.0, kd: off, student: resnet8}
"""


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--data", "x"), "--data"),
        (("--set", "kd=on"), "--set"),
        (("--seeds", "3"), "--seeds"),
        (("--jobs", "2"), "--jobs"),
        (("--keep-runs",), "--keep-runs"),
    ],
)
def test_theorem_takes_no_options_of_studies(kdfast, tmp_path: Path, words, option: str) -> None:
    ran = kdfast("reproduce", "theorem", "--out", tmp_path / "out", *words)
    assert (ran.code, ran.err) == (2, f"kdfast: the theorem takes no {option}: omit it\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_theorem_writes_a_page_and_a_picture(kdfast, tmp_path: Path) -> None:
    ran = kdfast("reproduce", "theorem", "--out", tmp_path)
    assert ran.code == 0, ran.err
    assert "squared bias at alpha 1" in ran.out
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "plot.svg"}


def test_page_of_a_study_is_made_again_without_the_data(kdfast, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(STUDY)
    out = tmp_path / "out"
    ran = kdfast("reproduce", tmp_path / "one.yaml", "--data", tiny, "--out", out)
    assert ran.code == 0, ran.err
    page = (out / "report.html").read_text()
    assert "1 of 1" in page
    (out / "report.html").unlink()
    again = kdfast("reproduce", tmp_path / "one.yaml", "--out", out, "--report-only")
    assert again.code == 0, again.err
    assert (out / "report.html").read_text() == page
    (out / "report.html").write_text("mine")
    refused = kdfast("reproduce", tmp_path / "one.yaml", "--out", out, "--report-only")
    assert (refused.code, "report.html" in refused.err, refused.err.count("\n")) == (4, True, 1), refused.err
