"""Plots of runs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from kdfast.errors import DataError, OutputError
from kdfast.report import plot_runs


def run_folder(path: Path, top1: float) -> Path:
    path.mkdir()
    (path / "result.json").write_text(json.dumps({"test_top1": top1}))
    rows = [{"step": s, "loss": 2.0 / s, **({"test_top1": top1 * s / 10} if s % 5 == 0 else {})} for s in range(1, 11)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_plot_has_a_color_per_group(tmp_path: Path) -> None:
    groups = {"KD": [run_folder(tmp_path / "a", 80.0)], "no KD": [run_folder(tmp_path / "b", 70.0)]}
    plot_runs(groups, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colors


def test_rejects_an_unfinished_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "a", 80.0)
    (folder / "result.json").unlink()
    with pytest.raises(DataError, match=r"result\.json"):
        plot_runs({"KD": [folder]}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_rejects_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        plot_runs({"KD": [run_folder(tmp_path / "a", 80.0)]}, tmp_path / "file" / "curves.png")
