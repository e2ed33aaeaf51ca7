"""The page of a sweep: every number on it equals one computed here from the rows, by other means."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from kdfast.errors import OutputError
from kdfast.sweep.page import render_sweep_page
from kdfast.sweep.report import report_sweep
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.summary import compare, group_rows

FRACTIONS, SEEDS, METHODS = (0.1, 0.3), (0, 1, 2), ("random", "el2n:use=dynamics", "dual")
EPOCHS = {0.1: 16, 0.3: 5, 1: 2}


def row(method: str, fraction: float, seed: int, top1: float, *, kd: bool = True, **changes: Any) -> dict[str, Any]:
    settings = {"data": "f" * 64, "student": "resnet8", "steps": 1250, "views": 0, "method": method}
    settings |= {"fraction": fraction, "kd": kd, "seed": seed, "cache": "c" if kd else None}
    settings |= {"alpha": "auto"} if kd else {}
    settings |= changes.pop("settings", {})
    key = f"{method}-{fraction}-{seed}-{kd}-{settings['steps']}"
    return {"key": key, "method": method, "fraction": fraction, "kd": kd, "seed": seed, "test_top1": top1,
            "kept": round(1000 * fraction), "steps": settings["steps"], "epochs": EPOCHS[fraction],
            "seconds": 30.0 + seed, "settings": settings,
            "costs": {"scores": 2.0, "cache": 100 * fraction, "selection": 0.5}, **changes}  # fmt: skip


def grid() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows = [
        row(method, fraction, seed, round(float(60 + 10 * number + 20 * fraction + rng.normal()), 2), kd=kd)
        for kd in (True, False)
        for seed in SEEDS
        for fraction in FRACTIONS
        for number, method in enumerate(METHODS)
    ]
    for line in rows:
        if line["method"] == "dual":
            line["costs"] = {"dynamics": 1500.0, "flatten": None, **line["costs"]}
    return rows


FULL = [
    *(row("random", 1, seed, 90.0 + seed) for seed in SEEDS),
    row("dual", 1, 0, 50.0),  # all data is all data: one row of each seed counts
    row("random", 1, 0, 95.0, settings={"steps": 12500}, epochs=16, steps=12512),
]


class Page(HTMLParser):
    """The elements of a page with their attributes and texts, in order; tables as lists of rows of texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[dict[str, Any]] = []
        self.seen: list[dict[str, Any]] = []
        self.feed(html)
        assert self.open == [], "the markup is well-formed"

    def handle_starttag(self, name: str, attributes: Any) -> None:
        element = {"name": name, "text": "", "inside": [e["name"] for e in self.open], **dict(attributes)}
        self.seen.append(element)
        if name != "meta":
            self.open.append(element)

    def handle_startendtag(self, name: str, attributes: Any) -> None:
        self.seen.append({"name": name, "text": "", "inside": [e["name"] for e in self.open], **dict(attributes)})

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop()["name"] == name

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element["text"] += data

    def within(self, start: dict[str, Any]) -> list[dict[str, Any]]:
        depth, place = len(start["inside"]), self.seen.index(start)
        inner = []
        for element in self.seen[place + 1 :]:
            if len(element["inside"]) <= depth:
                break
            inner.append(element)
        return inner

    def tables(self, caption: str) -> list[list[list[str]]]:
        found = []
        for element in self.seen:
            if element["name"] == "table" and caption in element["text"]:
                inner = self.within(element)
                rows = [e for e in inner if e["name"] == "tr"]
                found.append([[c["text"] for c in self.within(r) if c["name"] in ("th", "td")] for r in rows])
        return found

    def charts(self, label: str) -> list[list[dict[str, Any]]]:
        return [self.within(e) for e in self.seen if e["name"] == "svg" and label in e.get("aria-label", "")]


def page(rows: list[dict[str, Any]]) -> Page:
    return Page(render_sweep_page("s", group_rows(rows)))


def of(rows: list[dict[str, Any]], method: str, fraction: float, *, kd: bool) -> list[dict[str, Any]]:
    found = [r for r in rows if (r["method"], r["fraction"], r["kd"]) == (method, fraction, kd)]
    return sorted(found, key=lambda r: r["seed"])


@pytest.mark.parametrize("kd", [True, False])
@pytest.mark.parametrize("fraction", FRACTIONS)
def test_tables_have_means_paired_intervals_and_seconds(kd: bool, fraction: float) -> None:
    rows = grid()
    table = page([*rows, *FULL]).tables(f"{fraction:g} of the data")[0 if kd else 1]
    assert table[0] == ["method", "top-1 (%)", "minus random", "seconds"]
    expected = []
    base = [r["test_top1"] for r in of(rows, "random", fraction, kd=kd)]
    for method in ("dual", "el2n:use=dynamics", "random"):  # best first
        cell = of(rows, method, fraction, kd=kd)
        top1 = [r["test_top1"] for r in cell]
        gap = ""
        if method != "random":
            low, high = stats.ttest_rel(top1, base).confidence_interval(0.95)
            gap = f"{np.mean(top1) - np.mean(base):+.2f} [{low:+.2f}, {high:+.2f}]"
        seconds = 31.0 + 2 + 100 * fraction + 0.5 + (1500 if method == "dual" else 0)
        expected.append([method, f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}", gap, f"{seconds:,.0f}"])
    assert table[1:] == expected


def test_marks_lie_where_the_means_and_the_costs_are() -> None:
    """Pixels must be a linear function of accuracy, and of the logarithm of seconds, given by the labels of ticks."""
    rows = grid()
    found = page([*rows, *FULL])
    for kd, title in ((True, "With the teacher"), (False, "Without the teacher")):
        (chart,) = found.charts(f"{title}: accuracy against cost")
        texts = [e for e in chart if e["name"] == "text" and re.fullmatch(r"[\d,.]+", e["text"])]
        value = {id(e): float(e["text"].replace(",", "")) for e in texts}
        down = [e for e in texts if "end" in e["class"]]
        across = [e for e in texts if "middle" in e["class"]]
        assert len(down) >= 3
        assert len(across) >= 2
        y_of = np.polyfit([value[id(e)] for e in down], [float(e["y"]) - 4 for e in down], 1)
        x_of = np.polyfit(np.log([value[id(e)] for e in across]), [float(e["x"]) for e in across], 1)
        marks = {}
        for place, element in enumerate(chart):
            if element["name"] == "g" and "scale" in element.get("transform", ""):
                x, y, radius = map(float, re.findall(r"[\d.]+", element["transform"]))
                inner = chart[place + 1 :]
                marks[next(e["text"] for e in inner if e["name"] == "title")] = x, y, radius
        for method in METHODS:
            for fraction in FRACTIONS:
                top1 = np.mean([r["test_top1"] for r in of(rows, method, fraction, kd=kd)])
                seconds = 31 + 2 + 100 * fraction + 0.5 + (1500 if method == "dual" else 0)
                name = f"{method}, {fraction:g} kept: {top1:.2f}%, {seconds:,.0f} s (3 seeds)"
                x, y, radius = marks.pop(name)
                assert x == pytest.approx(np.polyval(x_of, np.log(seconds)), abs=0.2)
                assert y == pytest.approx(np.polyval(y_of, top1), abs=0.2)
                assert radius == (3 if fraction == 0.1 else 6)
        names = {"all data, same steps (2 epochs): 91.00%, 134 s (3 seeds)",
                 "all data, same epochs (16): 95.00%, 132 s (1 seed)"}  # fmt: skip
        assert marks.keys() == (names if kd else set())
        lines = [float(e["y1"]) for e in chart if e.get("class") == "reference"]
        assert lines == pytest.approx([np.polyval(y_of, v) for v in (91.0, 95.0)] if kd else [], abs=0.2)


def test_fractions_are_the_ticks_of_the_other_chart() -> None:
    (chart,) = page([*grid(), *FULL]).charts("With the teacher: accuracy against the kept fraction")
    across = [e for e in chart if e["name"] == "text" and e.get("class") == "tick middle"]
    assert [e["text"] for e in across] == ["0.1", "0.3"]
    assert len([e for e in chart if e.get("class") == "reference"]) == 2
    assert not [e for e in chart if e.get("class") == "star"], "all data is a line there, not a fraction"
    bars = [e for e in chart if e.get("class", "").startswith("bar")]
    assert len(bars) == len(METHODS) * len(FRACTIONS)


def test_all_data_says_what_it_is_compared_with() -> None:
    (table,) = page([*grid(), *FULL]).tables("All data")
    assert table[1:] == [
        ["1,250", "2", "91.00 ± 1.00 (3)", "134", "the same steps as 0.1, 0.3"],
        ["12,512", "16", "95.00 (1)", "132", "the same epochs as 0.1"],
    ]


def test_stages_and_what_is_unknown() -> None:
    table = page(grid()).tables("Unknown stages")[0]
    assert table[0] == ["run", "dynamics", "flattened teacher", "scores", "teacher's cache", "selection", "training",
                        "sum"]  # fmt: skip
    lines = {line[0]: line[1:] for line in table[1:]}
    assert lines["dual, 0.3"] == ["1,500", "unknown", "2", "30", "0.5", "31", "1,564"]
    assert lines["random, 0.1"] == ["", "", "2", "10", "0.5", "31", "44"]
    old = [{k: v for k, v in r.items() if k != "costs"} for r in grid()]
    (first, _) = page(old).tables("Rows of earlier versions")
    assert first[1] == ["random, 0.1", "31", "31"]


def test_fractions_with_steps_of_their_own_share_a_chart() -> None:
    rows = [row("random", f, 0, 60.0, settings={"steps": n}, steps=n) for f, n in ((0.1, 1264), (0.3, 1175))]
    full = row("random", 1, 0, 70.0, settings={"steps": 1264, "cut": True}, steps=1264, epochs=None)
    (comparison,) = compare(group_rows([*rows, full]))
    assert comparison.steps == (1175, 1264)
    (reference,) = comparison.full_runs(kd=True)
    assert (reference.steps, reference.same_steps, reference.same_epochs) == (1264, (0.1,), ())
    again = row("random", 0.1, 0, 65.0, settings={"steps": 5000}, steps=5000)
    apart = compare(group_rows([*rows, full, again]))
    assert [c.steps for c in apart] == [(1264,), (1175,), (5000,)], "two values at one place need two charts"
    assert all(len(c.full_rows) == 1 for c in apart)


def test_one_seed_has_no_interval_and_all_data_alone_is_a_page() -> None:
    rows = [r for r in grid() if r["seed"] == 0]
    table = page(rows).tables("0.1 of the data")[0]
    assert re.fullmatch(r"[+-]\d+\.\d\d", table[1][2])
    assert "±" not in table[1][1]
    alone = page([row("random", 1, 0, 70.0, kd=False)])
    assert len(alone.tables("1 of the data")) == 1
    assert alone.tables("All data") == []


EVIL = '<script>alert(1)</script>"><img src=x onerror=alert(2)>'


def test_names_are_escaped_and_nothing_is_loaded() -> None:
    rows = [*grid(), row(EVIL, 0.1, 0, 70.0), *FULL]
    for line in rows:
        line["settings"] = {**line["settings"], "student": EVIL}
    found = page(rows)
    assert {e["name"] for e in found.seen} & {"script", "link", "img", "iframe"} == set()
    assert all(not key.startswith("on") for e in found.seen for key in e)
    links = [e["href"] for e in found.seen if "href" in e]
    ids = [e["id"] for e in found.seen if "id" in e]
    assert len(ids) == len(set(ids))
    assert {link.removeprefix("#") for link in links} <= set(ids)
    assert all(e.get("aria-label") or e.get("aria-hidden") for e in found.seen if e["name"] == "svg")
    assert EVIL in next(e for e in found.seen if e["name"] == "main")["text"]


def test_report_writes_the_page_and_refuses_another_file(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path)
    for line in grid():
        log.append(line)
    report_sweep(tmp_path)
    assert (tmp_path / "report.html").read_text() == render_sweep_page(tmp_path.name, group_rows(log.results()))
    report_sweep(tmp_path)
    (tmp_path / "report.html").write_text("mine")
    with pytest.raises(OutputError, match=r"report\.html"):
        report_sweep(tmp_path)
    assert (tmp_path / "report.html").read_text() == "mine"
