"""Plots of runs."""

import json
from pathlib import Path

import pytest
from PIL import Image

from kdfast.data.views import Normalization
from kdfast.errors import CheckpointError, DataError, OutputError
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, save_model
from kdfast.report import plot_runs


def run_folder(path: Path, top1: float) -> Path:
    path.mkdir()
    net = build_net("resnet8", 2)
    student = Model(net, "resnet8", 2, ("a", "b"), Normalization((0.5,) * 3, (0.5,) * 3), {"test_top1": top1})
    save_model(path / "student.pt", student)
    scores = {"test_top1": top1, "test_top5": 100.0, "test_loss": 0.5, "weights": student.digest}
    counts = {"steps": 10, "images": 20, "seconds": 1.0, "images_per_second": 20.0, "kept": 2, "views": 1}
    settings = {"alpha": 0.0, "loader": "resident", "targets": None}
    (path / "result.json").write_text(json.dumps({**scores, **counts, **settings}))
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


def test_rejects_the_student_of_another_run(tmp_path: Path) -> None:
    folder, other = run_folder(tmp_path / "a", 80.0), run_folder(tmp_path / "b", 70.0)
    (other / "student.pt").rename(folder / "student.pt")
    with pytest.raises(CheckpointError, match=r"student\.pt is not the student that .*result\.json describes"):
        plot_runs({"KD": [folder]}, tmp_path / "curves.png")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"step": 11, "loss": NaN}', "NaN is not finite"),
        ('{"step": "11"}', "field step: expected int, got str"),
        ('{"step": 11, "loss": [1]}', "field loss"),
        ("[" * 100_000, "recursion"),
        ('{"step": ' + "1" * 5000 + "}", "out of range"),
    ],
)
def test_names_the_line_and_field_of_damaged_metrics(tmp_path: Path, row: str, message: str) -> None:
    folder = run_folder(tmp_path / "a", 80.0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(row + "\n")
    with pytest.raises(DataError, match=rf"line 11 of .*metrics\.jsonl.*{message}"):
        plot_runs({"KD": [folder]}, tmp_path / "curves.png")


def test_rejects_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        plot_runs({"KD": [run_folder(tmp_path / "a", 80.0)]}, tmp_path / "file" / "curves.png")
