"""Any path, any name of a class, any terminal: a result, or one clear line with a documented code."""

import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kdfast.data.views import Normalization
from kdfast.files import read_json, write_json
from kdfast.nets import build_net
from kdfast.nets.checkpoint import Model, save_model
from kdfast.report.markup import tag
from kdfast.report.runs import plot_runs
from kdfast.sweep.report import report_sweep, table
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.summary import group_rows
from kdfast.text import printable

NOT_UTF8 = os.fsdecode(b"caf\xe9")
ESCAPES = "\x1b[31mred\x1b]0;title\x07"
TRAINING = ("--net", "resnet8", "--epochs", 1, "--batch-size", 4)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """An image folder, itself and its classes named by bytes that are not UTF-8, or by escape sequences."""
    folder = tmp_path / f"data-{NOT_UTF8}"
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in (NOT_UTF8, ESCAPES):
            (folder / part / name).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number}-{NOT_UTF8}.png")
    return folder


def shown(*texts: str) -> bool:
    """Return whether the texts can be printed anywhere, and control no terminal."""
    return all(text == printable(text) and text.encode() for text in texts if text)


def test_names_that_are_not_utf8_or_control_a_terminal(kdfast, images: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out-{NOT_UTF8}"
    data = ("--data", images)
    weights = tmp_path / f"w-{NOT_UTF8}.pt"
    for command in (
        ("data", "info", images),
        ("teacher", "train", *data, *TRAINING, "--out", out / "t.pt"),
        ("eval", *data, "--model", out / "t.pt"),
        ("distill", *data, *TRAINING, "--teacher", out / "t.pt", "--out", out / "run"),
        ("distill", *data, *TRAINING, "--teacher", out / "t.pt", "--out", out / "run"),
        ("cache", *data, "--teacher", out / "t.pt", "--views", 1, "--out", out / "cache"),
        ("dynamics", *data, *TRAINING, "--out", out / "dyn"),
        ("data", "flip", images, out / "flip", "--share", 0.5),
        ("data", "info", out / "flip"),
        ("score", *data, "--method", "el2n", "--cache", out / "cache", "--out", out / "s.npz"),
        ("prune", *data, "--fraction", 0.5, "--scores", out / "s.npz", "--out", out / "idx.npy"),
        ("report", "scores", out / "s.npz", *data, "--subset", out / "idx.npy", "--out", out / "page.html"),
        ("teacher", "import", weights, *data, "--net", "resnet8", "--mean", "0,0,0", "--std", "1,1,1", "--out",
         out / "i.pt"),
        ("sweep", *data, "--student", "resnet8", "--kd", "off", "--fractions", 0.5, "--steps", 1, "--batch-size", 2,
         "--scores", f"{NOT_UTF8}={out}/s.npz", "--methods", f"random,{NOT_UTF8}", "--out", out / "sweep"),
    ):  # fmt: skip
        if command[:2] == ("teacher", "import"):
            torch.save(torch.load(out / "t.pt", weights_only=True)["state_dict"], weights)
        ran = kdfast(*command)
        assert ran.code == 0, (command, ran.err)
        assert shown(ran.out, ran.err), command
    for file in ("page.html", "sweep/table.md", "sweep/report.html"):
        assert shown((out / file).read_text(encoding="utf-8")), file
    assert "caf\\xe9" in (out / "page.html").read_text()
    ran = kdfast("eval", "--data", images, "--model", out / f"missing-{ESCAPES}.pt")
    assert (ran.code, shown(ran.err)) == (3, True)


@pytest.mark.slow  # it loads FFCV
def test_conversion_of_such_names(kdfast, images: Path, tmp_path: Path) -> None:
    pytest.importorskip("ffcv")
    out = tmp_path / f"out-{NOT_UTF8}"
    assert kdfast("data", "convert", images, out).code == 0
    ran = kdfast("data", "info", out)
    assert (ran.code, shown(ran.out), "caf\\xe9" in ran.out) == (0, True, True), ran.err


def test_json_keeps_such_names(tmp_path: Path) -> None:
    names = [NOT_UTF8, "é", ESCAPES]
    write_json(tmp_path / "a.json", names)
    assert read_json(tmp_path / "a.json") == names
    assert (tmp_path / "a.json").read_bytes().decode("utf-8")


BAD = {
    "empty": (("--out", ""), 2, "--out is empty"),
    "empty, with =": (("--out=",), 2, "--out is empty"),
    "root": (("--out", "/", "--dry-run"), 4, "/ holds"),  # broken code must write nothing there
    "long name": (("--out", "n" * 250), 2, "up to 250 in a name"),
    "long path": (("--out", "d/" * 3000), 2, "use at most"),
    "long data": (("--out", "run", "--data", "n" * 300), 2, "--data is n"),
    "huge size": (("--out", "run", "--size", 2**63), 2, "65535"),
    "huge batch": (("--out", "run", "--batch-size", 2**63), 2, "--batch-size"),
    "huge views": (("--out", "run", "--views", 2**63), 2, "--views"),
    "huge view seed": (("--out", "run", "--view-seed", 2**63), 2, "view-seed"),
    "huge epochs": (("--out", "run", "--epochs", 2**63), 2, "--epochs"),
    "huge warm-up": (("--out", "run", "--warmup-epochs", 1e308), 2, "--warmup-epochs"),
}


@pytest.mark.parametrize("name", BAD)
def test_paths_and_numbers_over_the_limits(kdfast, tiny: Path, tmp_path: Path, monkeypatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    more, code, message = BAD[name]
    ran = kdfast("distill", "--data", tiny, "--student", "resnet8", "--alpha", 0, "--epochs", 1, "--batch-size", 20,
                 *more)  # fmt: skip
    assert (ran.code, message in ran.err) == (code, True), ran.err
    assert ran.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("length", [200, 239])
def test_names_near_the_limit_work(kdfast, tiny: Path, tmp_path: Path, length: int) -> None:
    for command in (
        ("prune", "--data", tiny, "--fraction", 0.5, "--out", tmp_path / f"{'n' * (length - 4)}.npy"),
        ("score", "--data", tiny, "--method", "random", "--out", tmp_path / f"{'s' * (length - 4)}.npz"),
        ("data", "flip", tiny, tmp_path / ("f" * length)),
    ):
        assert kdfast(*command).code == 0
    assert not [f for f in tmp_path.iterdir() if "kdtmp" in f.name]


def test_an_empty_path_in_a_configuration_file(kdfast, tiny: Path, tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    for value in ('""', '"a\\0b"'):
        config.write_text(f"data: {tiny}\nstudent: resnet8\nout: {value}\n")
        ran = kdfast("distill", "--config", config)
        assert (ran.code, "out is" in ran.err) == (2, True), ran.err


@pytest.mark.parametrize("command", ["sweep", "import", "report"])
def test_a_terminal_of_ascii_takes_every_result(kdfast, tiny, teacher, tmp_path, monkeypatch, command) -> None:
    torch.save(torch.load(teacher, weights_only=True)["state_dict"], tmp_path / "w-é.pt")
    assert kdfast("score", "--data", tiny, "--method", "random", "--out", tmp_path / "é.npz").code == 0
    arguments = {
        "sweep": ("sweep", "--data", tiny, "--student", "resnet8", "--kd", "off", "--fractions", 0.5, "--steps", 1,
                  "--batch-size", 20, "--seeds", "0,1", "--out", tmp_path / "sweep"),
        "import": ("teacher", "import", tmp_path / "w-é.pt", "--data", tiny, "--net", "resnet8", "--mean", "0,0,0",
                   "--std", "1,1,1", "--out", tmp_path / "t-é.pt"),
        "report": ("report", "scores", tmp_path / "é.npz", "--data", tiny, "--out", tmp_path / "p-é.html"),
    }[command]  # fmt: skip
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict")
    monkeypatch.setattr(sys, "stdout", stream)
    ran = kdfast(*arguments)
    monkeypatch.undo()
    assert ran.code == 0, ran.err
    stream.flush()
    printed = stream.buffer.getvalue()
    assert rb"\xb1" in printed or rb"\xe9" in printed


@pytest.mark.parametrize("arguments", [("doctor",), ("--help",), ("score", "--help-options")])
def test_a_full_stdout_is_an_output_that_cannot_be_written(arguments: tuple[str, ...]) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "kdfast", *arguments]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=120, check=False)
    assert (ran.returncode, "cannot write to the standard output" in ran.stderr) == (4, True), ran.stderr
    assert ran.stderr.count("\n") == 1


ODD = ["cost $5", "$a$b", "$\\frac$", "a|b", "_hidden", "_", "a_b", "*star*", "`code`", "<b>", "[x]", ESCAPES, NOT_UTF8]


@pytest.mark.parametrize(
    "words", [("--help",), ("doctor",), ("data", "info", "x.npz"), ("prune", "--data", "digits", "--fraction", 0.5)]
)
def test_a_current_folder_that_was_deleted(kdfast, tmp_path: Path, monkeypatch, words: tuple[object, ...]) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    ran = kdfast(*words)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert "the current folder cannot be used (No such file or directory): change to another one with cd" in ran.err


def test_odd_names_of_methods_break_no_table_and_no_plot(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path)
    for seed in (0, 1):
        for name in ("random", *ODD):
            settings = {"data": "f" * 64, "student": "resnet8", "steps": 1, "method": name, "fraction": 0.5}
            settings |= {"kd": False, "seed": seed}
            log.append({"key": f"{name}{seed}", "method": name, "fraction": 0.5, "kd": False, "seed": seed,
                        "test_top1": 50.0 + seed, "kept": 10, "steps": 1, "seconds": 1.0,
                        "settings": settings})  # fmt: skip
    text = report_sweep(tmp_path)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 1 + len(ODD)
    bare = {line.replace("\\|", "").count("|") for line in rows}
    assert bare == {4}, "every row has as many cells as the head"
    assert shown(text)
    assert "| a_b |" in text
    assert "\\_hidden" in text
    (section,) = group_rows(log.rows())
    assert table(section) == text


def test_a_legend_shows_odd_names(tmp_path: Path) -> None:
    student = Model(build_net("resnet8", 2), "resnet8", 2, ("a", "b"), Normalization((0.5,) * 3, (0.5,) * 3))
    result = {"test_top1": 50.0, "test_top5": 100.0, "test_loss": 0.7, "steps": 1, "weights": student.digest}
    result |= {"images": 2, "seconds": 1.0, "images_per_second": 2.0, "kept": 2, "views": 1, "alpha": 0.0}
    for number, name in enumerate(ODD):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_json(folder / "result.json", {**result, "loader": "resident", "targets": None})
        save_model(folder / "student.pt", student)
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "test_top1": 50.0}\n')
        plot_runs({name: [folder], "other": [folder]}, tmp_path / "curves.png")
        (tmp_path / "curves.png").unlink()


def test_markup_shows_control_characters_as_escapes() -> None:
    assert tag("p", "a\x1b[31m\x00\x9b", title=NOT_UTF8) == '<p title="caf\\xe9">a\\x1b[31m\\x00\\x9b</p>'
    assert printable("é\n\t\u202e") == "é\n\t\\u202e"
