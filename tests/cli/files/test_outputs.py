"""One rule for all outputs: what kdfast did not write, and what is also an input, is refused before the work."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.pruning.score_file import ScoreFile, write_scores
from kdfast.report.page import render_page, write_page
from kdfast.report.plots import check_plot_path
from kdfast.sweep.report import check_report_files

MINE = b"<html>years of work</html>"
TRAINING = ("--epochs", 1, "--batch-size", 20)


@pytest.fixture(scope="module")
def scores(tiny: Path, tmp_path_factory) -> Path:
    from kdfast.data.readers.registry import open_source

    path = tmp_path_factory.mktemp("scores") / "scores.npz"
    write_scores(path, ScoreFile(np.arange(120.0), "el2n", open_source(tiny).fingerprint))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name != ".kdfast.lock")
    return {str(f.relative_to(folder)): f.read_bytes() for f in files}


def command_for(name: str, tiny: Path, scores: Path, teacher: Path, out: Path) -> tuple[object, ...]:
    sweep = ("sweep", "--data", tiny, "--student", "resnet8", "--kd", "off", "--fractions", 0.5, "--steps", 1,
             "--batch-size", 20)  # fmt: skip
    return {
        "score": ("score", "--data", tiny, "--method", "random", "--out", out),
        "prune": ("prune", "--data", tiny, "--fraction", 0.5, "--out", out),
        "report": ("report", "scores", scores, "--data", tiny, "--out", out),
        "sweep": (*sweep, "--out", out.parent),
        "distill": ("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, *TRAINING, "--out", out.parent),
        "dynamics": ("dynamics", "--data", tiny, "--net", "resnet8", *TRAINING, "--out", out.parent),
        "cache": ("cache", "--data", tiny, "--teacher", teacher, "--views", 1, "--out", out.parent),
        "flip": ("data", "flip", tiny, out.parent),
        "train": ("teacher", "train", "--data", tiny, "--net", "resnet8", *TRAINING, "--out", out),
    }[name]


FOREIGN = [
    ("score", "mine.npz"), ("prune", "mine.npy"), ("prune", "mine.json"), ("report", "index.html"),
    ("sweep", "table.md"), ("sweep", "plot.png"), ("sweep", "report.html"), ("sweep", "notes.txt"),
    ("distill", "notes.txt"), ("dynamics", "labels.npy"), ("dynamics", "plan.json"), ("cache", "features.npy"),
    ("cache", "manifest.json"), ("flip", "labels.npy"), ("train", "t.pt"),
]  # fmt: skip


# These have no --dry-run, or look at the output after it.
NOT_DRY = ("report", "flip")


@pytest.mark.parametrize(
    ("name", "file", "dry"),
    [(*one, dry) for one in FOREIGN for dry in (False, True) if not (dry and one[0] in NOT_DRY)],
)
def test_refuses_foreign_files_before_the_work(kdfast, tiny, scores, teacher, tmp_path, monkeypatch, name, file, dry):
    folder = tmp_path / "proj"
    folder.mkdir()
    (folder / file).write_bytes(MINE)
    if name == "train":
        (folder / "t.pt.run").mkdir()
    out = folder / file
    command = command_for(name, tiny, scores, teacher, out.with_suffix(".npy") if file == "mine.json" else out)

    def work(*_: object, **__: object) -> None:
        pytest.fail("the work began")

    for place in ("distillation.record_dynamics.train", "distillation.train.train",
                  "pruning.scores.compute.ScoreSources.score", "pruning.select.select_subset"):  # fmt: skip
        monkeypatch.setattr(f"kdfast.{place}", work)
    ran = kdfast(*command, *(["--dry-run"] if dry else []))
    assert ran.code == 4, (ran.err, ran.out)
    assert file in ran.err
    assert contents(folder) == {file: MINE}


@pytest.mark.parametrize("way", ["the same path", "a link to it", "a link as input", "another spelling"])
def test_refuses_an_output_that_is_an_input(kdfast, tiny: Path, tmp_path: Path, way: str) -> None:
    data = tmp_path / "e.npz"
    shutil.copy(tiny, data)
    before, given, out = data.read_bytes(), data, data
    if way == "a link to it":
        out = tmp_path / "link.npz"
        out.symlink_to(data)
    elif way == "a link as input":
        given = tmp_path / "link.npz"
        given.symlink_to(data)
    elif way == "another spelling":
        out = tmp_path / "x" / ".." / "e.npz"
        (tmp_path / "x").mkdir()
    ran = kdfast("score", "--data", given, "--method", "random", "--out", out)
    assert ran.code == 4, ran.err
    assert "which is also --data" in ran.err
    assert data.read_bytes() == before


def test_refuses_an_input_folder_as_output_and_outputs_among_images(kdfast, cache, tiny, tmp_path) -> None:
    before = contents(cache)
    ran = kdfast("distill", "--data", tiny, "--student", "resnet8", "--cache", cache, *TRAINING, "--out", cache)
    assert (ran.code, "which is also --cache" in ran.err) == (4, True), ran.err
    assert contents(cache) == before
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.new("RGB", (8, 8), "red" if name == "a" else "blue").save(tmp_path / part / name / "0.png")
    common = ("--data", tmp_path, "--net", "resnet8", "--epochs", 1, "--batch-size", 2)
    inside = tmp_path / "train" / "run"
    for command in (
        ("distill", *common, "--alpha", 0, "--out", inside),
        ("dynamics", *common, "--out", inside),
        ("data", "flip", tmp_path, inside, "--share", 0.5),
        ("prune", "--data", tmp_path, "--fraction", 0.5, "--out", inside / "idx.npy"),
    ):
        ran = kdfast(*command)
        assert (ran.code, "among the images" in ran.err) == (4, True), ran.err
    assert sorted(f.name for f in (tmp_path / "train").iterdir()) == ["a", "b"]


def test_replaces_its_own_files(kdfast, tiny, scores, teacher, tmp_path) -> None:
    for name, file in (("score", "s.npz"), ("report", "s.html"), ("prune", "idx.npy"), ("sweep", "sweep/table.md")):
        command = command_for(name, tiny, scores, teacher, tmp_path / file)
        for _ in range(2):
            ran = kdfast(*command)
            assert ran.code == 0, ran.err
    (tmp_path / "sweep" / "table.md").write_bytes(MINE)
    ran = kdfast("sweep", "--report-only", "--out", tmp_path / "sweep")
    assert (ran.code, (tmp_path / "sweep" / "table.md").read_bytes()) == (4, MINE)


def test_replaces_the_model_of_its_own_run_only(kdfast, tiny: Path, tmp_path: Path) -> None:
    command = command_for("train", tiny, tiny, tiny, tmp_path / "t.pt")
    for _ in range(2):
        assert kdfast(*command).code == 0
    mine = torch.load(tmp_path / "t.pt", weights_only=True)
    torch.save(mine["state_dict"], tmp_path / "t.pt")
    before = (tmp_path / "t.pt").read_bytes()
    ran = kdfast(*command)
    assert (ran.code, "is not the result of" in ran.err) == (4, True), ran.err
    assert (tmp_path / "t.pt").read_bytes() == before


def test_recognizes_what_earlier_versions_wrote(tmp_path: Path) -> None:
    """Their pages and tables have the same last and first line, their plots matplotlib's signature."""
    from matplotlib.figure import Figure

    write_page(render_page("t", "", []), tmp_path / "page.html")
    (tmp_path / "table.md").write_text("**student resnet8, steps 10, views 0** (data 0123456789ab)\n\n| x |\n")
    Figure(figsize=(14, 5), layout="constrained").savefig(tmp_path / "plot.png", dpi=120)
    check_report_files(tmp_path)
    write_page(render_page("t", "", []), tmp_path / "page.html")
    Figure(figsize=(10, 4)).savefig(tmp_path / "curves.png", dpi=120)
    check_plot_path(tmp_path / "curves.png")


def test_keeps_a_foreign_search_file(kdfast, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "idx.search.json").write_bytes(MINE)
    assert kdfast("prune", "--data", tiny, "--fraction", 0.5, "--out", tmp_path / "idx.npy").code == 0
    assert (tmp_path / "idx.search.json").read_bytes() == MINE
