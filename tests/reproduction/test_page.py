"""The pages of studies and of the theorem: every number on them equals one computed here by other means."""

import json
import re
import shlex
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from scipy import stats

from kdfast.errors import OutputError, UsageError
from kdfast.reproduction.cells import Cell
from kdfast.reproduction.report.page import render_study_page, write_report
from kdfast.reproduction.report.results import collect, conditions, restriction, rows_of_data
from kdfast.reproduction.selection import parse_restrictions, select_cells
from kdfast.reproduction.study import Study
from kdfast.reproduction.study_file import load_study, read_study, study_names
from kdfast.reproduction.table import table
from kdfast.reproduction.theorem.page import describe, reproduce_theorem
from kdfast.reproduction.theorem.regression import Problem

STUDY = """
title: Two methods
source: A paper, Table 1
recipe: {epochs: 240, batch_size: 64}
defaults: {student: resnet8, teacher: resnet14}
cells:
  - {method: [random, el2n], fraction: [0.1, 0.3], kd: [off, on]}
  - {fraction: 1.0, kd: off}
  - {fraction: 1.0, kd: off, match_steps_of: 0.1}
order: [fraction, kd, method]
published:
  cifar100:
    - {method: random, kd: on, fraction: [0.1, 0.3], top1: [50.0, 60.5]}
    - {method: el2n, kd: on, fraction: 0.1, top1: 44.0}
teacher_top1: {cifar100: {resnet14: 69.9}}
plot: {x: fraction, lines: [method, kd]}
"""
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "mine.yaml").write_text(STUDY)
    return read_study(tmp_path / "mine.yaml")


def cell(study: Study, method: str, fraction: float, *, kd: bool, match: float | None = None) -> Cell:
    wanted = (method, fraction, kd, match)
    (found,) = [c for c in study.cells if (c.method, c.fraction, c.kd, c.match_steps_of) == wanted]
    return found


def row(cell: Cell, seed: int, top1: float, **changes: Any) -> dict[str, Any]:
    values = {
        "cell": json.loads(json.dumps(cell.to_dict())), "seed": seed, "test_top1": top1, "test_top5": 90.0,
        "dataset": "cifar100", "compressed_to": None, "epochs": 240, "steps": 18_960, "seconds": 3600.0 * (seed + 1),
        "teacher_top1": 68.8 if cell.kd else None, "precision": "bf16", "kdfast": "0.1.0", "torch": "2.13.0",
        "machine": {"host": "here", "device": "Xeon", "threads": 2}, "command": f"kdfast distill --seed {seed}",
        "settings": {"data": "d", "seed": seed, "view_seed": seed, "targets": "cache", "precision": "bf16"},
    }  # fmt: skip
    values |= changes
    return {**values, "key": json.dumps([values["cell"], values["settings"], values["compressed_to"], top1])}


def three(study: Study) -> list[dict[str, Any]]:
    chosen = cell(study, "random", 0.1, kd=True)
    return [row(chosen, seed, top1) for seed, top1 in enumerate((55.0, 56.5, 56.0))]


def parse(html: str) -> ET.Element:
    return ET.fromstring(html.removeprefix("<!doctype html>\n"))


def text(element: ET.Element) -> str:
    return "".join(element.itertext())


def cells_of(page: ET.Element, kind: str) -> dict[str, list[str]]:
    """Return the cells of a table's rows by the first one."""
    (found,) = [t for t in page.iter("table") if t.get("class") == kind]
    rows = [[text(c) for c in r] for r in found.iter("tr")]
    return {line[0]: line[1:] for line in rows}


def test_table_has_mean_interval_published_difference_and_hours(study: Study) -> None:
    rows = [*three(study), row(cell(study, "el2n", 0.3, kd=False), 0, 33.25)]
    table = cells_of(parse(render_study_page(collect(study, rows, "cifar100"), "run")), "study")
    low, high = stats.t.interval(0.95, 2, np.mean([55, 56.5, 56]), stats.sem([55, 56.5, 56]))
    assert table["random, 0.1 of the data, KD"] == [
        "55.83", f"{low:.2f} to {high:.2f}", "3", "50.00", "+5.83", "18,960", "2",
    ]  # fmt: skip
    assert table["el2n, 0.3 of the data, no KD"] == ["33.25", "", "1", "", "", "18,960", "1"]
    assert table["random, 0.3 of the data, KD"] == ["open", "", "", "60.50", "", "", ""]
    assert len(table) == 1 + len(study.cells)


def test_compressed_schedule_says_so_and_subtracts_nothing(study: Study, tmp_path: Path) -> None:
    rows = [{**one, "compressed_to": 60, "epochs": 60} for one in three(study)]
    page = parse(render_study_page(collect(study, rows, "cifar100"), "run"))
    assert "Not the published recipe: the schedule was compressed from 240 to 60 epochs" in text(page)
    assert cells_of(page, "study")["random, 0.1 of the data, KD"][3:5] == ["50.00", ""]
    assert "run --epochs 60 --set" in text(page)
    write_report(collect(study, rows, "cifar100"), tmp_path, "run")
    assert "Two methods (cifar100, compressed to 60 epochs)" in (tmp_path / "plot.svg").read_text()
    both = collect(study, [*rows, *three(study)], "cifar100")
    assert [(r.epochs, len(r.done)) for r in both] == [(None, 1), (60, 1)]


def test_rows_of_other_cells_are_left_out_and_the_last_of_a_seed_counts(study: Study) -> None:
    chosen = cell(study, "random", 0.1, kd=True)
    other = {**row(chosen, 1, 1.0), "cell": {**chosen.to_dict(), "fraction": 0.2}}
    (results,) = collect(study, [row(chosen, 0, 1.0), other, row(chosen, 0, 57.0)], "cifar100")
    assert [r.values for r in results.done] == [[57.0]]


@pytest.mark.parametrize("setting", ["teacher", "precision", "inputs"])
def test_rows_that_differ_in_more_than_the_seed_are_not_averaged(study: Study, setting: str, tmp_path: Path) -> None:
    old = three(study)
    settings = {**old[0]["settings"], setting: "another", "seed": 7, "view_seed": 7, "targets": "online"}
    new = row(cell(study, "random", 0.1, kd=True), 7, 10.0, settings=settings)
    (last,) = collect(study, [*old, new], "cifar100")
    assert [(r.values, r.left_out) for r in last.done] == [([10.0], 3)]
    (chosen,) = collect(study, [*old, new], "cifar100", {conditions(old[1]["settings"])})
    assert [(r.values, r.left_out) for r in chosen.done] == [([55.0, 56.5, 56.0], 1)]
    said = "1 run is left out: more than the seed differs from the runs shown, such as teacher or precision."
    assert said in table(chosen)
    assert said in text(parse(render_study_page([chosen], "run")))
    assert "3 runs are left out" in table(last)
    (none,) = collect(study, old, "cifar100")
    assert "left out" not in table(none) + text(parse(render_study_page([none], "run")))


def test_a_recipe_that_spells_out_defaults_is_the_same_cell(study: Study, tmp_path: Path) -> None:
    spelled = STUDY.replace("recipe: {epochs: 240,", "recipe: {epochs: 240, schedule: step, lr: 0.05, momentum: 0.9,")
    (tmp_path / "spelled.yaml").write_text(spelled)
    assert read_study(tmp_path / "spelled.yaml").cells == study.cells
    short = row(cell(study, "random", 0.1, kd=True), 0, 57.0)
    short["cell"]["recipe"] = {"epochs": 240, "batch_size": 64}  # as earlier versions wrote it
    (results,) = collect(study, [short], "cifar100")
    assert [r.values for r in results.done] == [[57.0]]


def test_a_run_serves_all_fractions_whose_steps_are_as_many_epochs(tmp_path: Path) -> None:
    text = STUDY.replace("match_steps_of: 0.1}", "match_steps_of: [0.1, 0.12, 0.5]}")
    (tmp_path / "steps.yaml").write_text(text)
    study = read_study(tmp_path / "steps.yaml")
    trained = row(cell(study, "random", 1.0, kd=False, match=0.1), 0, 40.0, compressed_to=4, epochs=1, kept=1000)
    (results,) = collect(study, [trained], "cifar100")
    assert [r.cell.match_steps_of for r in results.done] == [0.1, 0.12]
    assert results.rows == [trained]


def test_data_may_be_named_after_the_runs() -> None:
    rows = [{"dataset": name, "settings": {"data": data}} for name, data in (("npz", "a"), ("npz", "b"), ("svhn", "c"))]
    assert rows_of_data(rows, "cifar100", "a") == [{**rows[0], "dataset": "cifar100"}]
    assert rows_of_data(rows[:1], "cifar100") == [{**rows[0], "dataset": "cifar100"}]
    assert rows_of_data(rows, "npz") == rows[1:2], "two sets of one kind are two; the last counts"
    assert rows[0]["dataset"] == "npz", "the rows themselves stay"
    with pytest.raises(UsageError, match="`dataset` is 'cifar100', and the rows are of several: pass one of npz, svhn"):
        rows_of_data(rows, "cifar100")


def test_markdown_has_the_fields_of_the_recipe_in_which_cells_differ(tmp_path: Path) -> None:
    text = "title: T\nsource: S\ncells: [{fraction: 0.5, kd: off}, {fraction: 0.5, kd: off, label_smoothing: 0.1}]\n"
    (tmp_path / "two.yaml").write_text(text)
    study = read_study(tmp_path / "two.yaml")
    lines = table(collect(study, [], "cifar100")[0]).splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("| ")] == ["label_smoothing", "0", "0.1"]


def test_teachers_stand_beside_the_papers(study: Study) -> None:
    page = parse(render_study_page(collect(study, three(study), "cifar100"), "run"))
    (table,) = [t for t in page.iter("table") if "Test accuracy of the teachers" in text(t)]
    assert [text(c) for c in list(table.iter("tr"))[1]] == ["resnet14", "1", "68.80", "69.90", "-1.10"]


@pytest.mark.parametrize("name", study_names())
def test_command_of_an_open_cell_runs_that_cell_alone(name: str) -> None:
    study = load_study(name)
    axes = study.varying()
    for chosen in study.cells:
        words = shlex.split(restriction(chosen, axes))
        assert words[::2] == ["--set"] * (len(words) // 2)
        assert select_cells(study, parse_restrictions(words[1::2])) == [chosen]


def marks(picture: ET.Element, kind: str) -> list[tuple[float, float]]:
    """Return the (x, y) of the marks of the chart, in its units."""
    (drawing,) = [s for s in picture.iter(f"{SVG}svg") if s.get("class") == "chart"]
    found = []
    for group in drawing.iter(f"{SVG}g"):
        inner = group.find(f"{SVG}g")
        if inner is not None and inner.get("class", "").split(" c")[0] == kind:
            x, y, _ = map(float, re.findall(r"[\d.]+", group.get("transform", "")))
            found.append((x, y))
    return found


def test_picture_has_ours_solid_and_published_hollow_at_their_heights(study: Study, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    full = row(cell(study, "random", 1.0, kd=False, match=0.1), 0, 40.0)
    write_report(collect(study, [*three(study), full], "cifar100"), out, "run")
    picture = ET.fromstring((out / "plot.svg").read_text())
    (drawing,) = [s for s in picture.iter(f"{SVG}svg") if s.get("class") == "chart"]
    ticks = [t for t in drawing.iter(f"{SVG}text") if t.get("class") == "tick end"]
    y_of = np.polyfit([float(text(t)) for t in ticks], [float(t.get("y", "")) - 4 for t in ticks], 1)
    hollow = sorted(marks(picture, "mark hollow"))
    assert [y for _, y in hollow] == pytest.approx(
        [*sorted(np.polyval(y_of, [44.0, 50.0]))[::1], np.polyval(y_of, 60.5)], abs=0.2
    )
    ((x, y),) = marks(picture, "mark")
    assert (x, y) == pytest.approx((hollow[0][0], np.polyval(y_of, 167.5 / 3)), abs=0.2)
    (line,) = [e for e in drawing.iter(f"{SVG}line") if e.get("class") == "reference"]
    assert float(line.get("y1", "")) == pytest.approx(np.polyval(y_of, 40.0), abs=0.2)
    names = [text(t) for t in picture.findall(f"{SVG}text")]
    assert names == ["Two methods (cifar100)", "random, KD", "el2n, KD", "published"]
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", (out / "plot.svg").read_text())


def test_without_rows_the_page_shows_what_is_published_and_every_cell_open(study: Study, tmp_path: Path) -> None:
    command = f"kdfast reproduce {study.argument} --data 'cifar data' --teacher resnet14=t.pt"
    write_report(collect(study, [], "cifar100"), tmp_path, command)
    page = parse((tmp_path / "report.html").read_text())
    assert "0 of 10" in text(page)
    assert f"{command} --set method=random --set fraction=0.1 --set kd=off" in text(page)
    assert len(marks(ET.fromstring((tmp_path / "plot.svg").read_text()), "mark hollow")) == 3
    write_report(collect(study, [], "svhn"), tmp_path, command)  # nothing published, nothing run: no chart
    assert not (tmp_path / "plot.svg").exists(), "nor that of other data"


def test_published_top5_is_compared_with_top5() -> None:
    study = load_study("fig4-imagenet")
    chosen = next(c for c in study.cells if (c.method, c.fraction, c.kd) == ("random", 0.1, False))
    rows = [row(chosen, 0, 60.0, test_top5=80.0, dataset="imagenet")]
    (results,) = collect(study, rows, "imagenet")
    assert results.done[0].difference == pytest.approx(80.0 - 82.37)


def test_names_are_escaped_and_nothing_is_loaded(study: Study) -> None:
    evil = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'
    rows = [row(cell(study, "random", 0.1, kd=True), 0, 50.0, command=evil)]
    page = parse(render_study_page(collect(study, rows, "cifar100"), evil))
    assert {e.tag for e in page.iter()} & {"script", "link", "img", "iframe"} == set()
    assert evil in text(page)


@pytest.mark.parametrize("name", ["report.html", "plot.svg"])
def test_files_of_others_are_not_replaced(study: Study, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    write_report(collect(study, three(study), "cifar100"), out, "run")
    write_report(collect(study, three(study), "cifar100"), out, "run")
    (out / name).write_text("mine")
    with pytest.raises(OutputError, match=name.replace(".", r"\.")):
        write_report(collect(study, three(study), "cifar100"), out, "run")
    with pytest.raises(OutputError, match=name.replace(".", r"\.")):
        reproduce_theorem(out)
    assert (out / name).read_text() == "mine"


def test_theorem_page_has_the_numbers_of_the_result(tmp_path: Path) -> None:
    problem = Problem(samples=200, features=5, draws=100, subsets=3, top=2)
    result = reproduce_theorem(tmp_path, problem=problem)
    page = parse((tmp_path / "report.html").read_text())
    (table,) = [t for t in page.iter("table") if "standard error" in text(t)]
    shown = [[text(c) for c in line] for line in list(table.iter("tr"))[1:]]
    assert [(p[0], p[1], p[2], p[4]) for p in shown] == [
        (f"{p['alpha']:g}", f"{p['teacher_fraction']:g}", f"{p['bias']:.5f}", f"{p['variance']:.5f}")
        for p in result["points"]
    ]
    assert f"{result['points'][12]['bias']:.4f} with a teacher on the student's samples" in describe(result)
    ET.fromstring((tmp_path / "plot.svg").read_text())
    assert json.loads(json.dumps(result)) is not None
