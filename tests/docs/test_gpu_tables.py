"""bench/make_tables.py: pages hold what the committed GPU results say, and *not measured* where they say nothing."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "bench"))

import make_tables  # noqa: E402
from gpu.measure import gradients, kd_loss, peers, selection, tools, training  # noqa: E402
from gpu.parts import parts  # noqa: E402
from gpu.results import COMMITTED, read_rows  # noqa: E402
from make_tables import MISSING, Measured, fill  # noqa: E402

PAGE = "before\n<!-- gpu {} -->\nold\n<!-- end -->\nafter\n"


def row(part, key, **values):
    return {"part": part, "key": key, "kind": "cuda", "run": "now", **values}


def loss(**values):
    found = {"forward_ms": 0.5, "ms": 0.5625, "bytes": 1.8e9, "copy_bytes_per_second": 3e12, **values}
    return row("kd_loss", "bfloat16 C=1000 forward", **found)


MACHINE = row(
    "machine", "now", name="GPU X", commit="abc", torch="2", idle={}, versions={"triton": "3", "nvcc": "13"},
    copy_bytes_per_second=4e12,
)  # fmt: skip


@pytest.mark.parametrize("page", make_tables.PAGES, ids=lambda page: page.name)
def test_pages_agree_with_the_results(page):
    assert fill(page.read_text(), Measured(read_rows(COMMITTED))) == page.read_text()


@pytest.mark.parametrize("name", sorted(make_tables.TABLES))
def test_every_table_is_on_a_page_and_replaces_only_itself(name):
    assert any(f"<!-- {kind} {name} -->" in page.read_text() for page in make_tables.PAGES for kind in ("gpu", "cpu"))
    filled = fill(PAGE.format(name), Measured([]))
    assert filled.startswith(f"before\n<!-- gpu {name} -->\n")
    assert filled.endswith("<!-- end -->\nafter\n")
    assert "old" not in filled


def test_measured_values_name_device_and_commit_and_others_are_not_measured():
    scaled = {**loss(bytes=3e9, ms=1.0), "key": "bfloat16 C=1000 forward scaled"}
    text = fill(PAGE.format("kd-loss"), Measured([MACHINE, loss(), scaled]))
    assert f"| 1000 | 90% (0.500 ms) | 80% | 75% | {MISSING} | {MISSING} | >= 90% | GPU X, abc |" in text
    assert f"| 32000 | {MISSING} | {MISSING} | {MISSING} | {MISSING} |" in text
    assert f"| 10 | {MISSING} | {MISSING} |  | {MISSING} |" in text


def test_the_newest_row_counts_and_failures_and_cpu_rows_do_not():
    assert "| 50% |" in make_tables.overview(Measured([MACHINE, loss(), loss(forward_ms=0.9)]))
    for ignored in (loss(outcome="failed"), loss() | {"kind": "cpu"}):
        assert make_tables.overview(Measured([ignored])) == make_tables.overview(Measured([]))


def test_a_share_is_that_of_the_fastest_copy_measured_on_the_device():
    other = MACHINE | {"run": "later", "key": "later"}
    assert "| 90% |" in make_tables.overview(Measured([MACHINE, loss()]))  # of 4 TB/s, not of the 3 beside the row
    assert "| 72% |" in make_tables.overview(Measured([MACHINE, loss(), other | {"copy_bytes_per_second": 5e12}]))
    another = other | {"copy_bytes_per_second": 8e12, "name": "GPU Y"}
    assert "| 90% |" in make_tables.overview(Measured([MACHINE, loss(), another]))


def test_the_table_of_the_last_layer_names_machine_and_versions_and_what_misses_a_target():
    def row(what, **values):
        shape = {"V": 32000, "dtype": "bfloat16", "teacher": "hidden", "what": what}
        return {**shape, "seconds": [0.1, 0.09, 0.11], "kdfast_is_faster": [2.0, 1.9, 2.25], **values}

    ours = row("kdfast", to_products=[1.3, 1.2, 1.4], memory_to_unfused=0.041)
    machine = {"cpu": "CPU X", "threads": 2, "load": 0.5, "torch": "2", "commit": "abc"}
    results = {"rows": [ours, row("compile"), row("TRL")], "rounds": 7, "machine": machine}
    text = make_tables.linear_kd_loss(results | {"versions": {"trl": "1.2", "liger-kernel": None}})
    times = "2.00 (1.90 to 2.25)"
    assert (
        f"| 32,000, bfloat16 | hidden | 100.0 ms | 1.30 (1.20 to 1.40), above 1.25 | 4.1% | {times} |  |  | {times} |"
        in text
    )
    assert "7 rounds on CPU X, 2 threads, load 0.5; torch 2, trl 1.2; abc." in text
    assert make_tables.linear_kd_loss({"rows": []}) == f"{MISSING}\n"


class Asked(Measured):
    """Records which rows the tables ask for."""

    def __init__(self):
        super().__init__([])
        self.keys = set()

    def row(self, part, key):
        self.keys.add((part, key))
        return {}


def test_the_tables_ask_for_rows_that_the_parts_measure():
    asked = Asked()
    for table in make_tables.TABLES.values():
        table(asked)
    plain = [setting.key for setting in training.settings("cuda")]
    known = {
        "kd_loss": [key for case in kd_loss.cases("cuda") for key in (case.key, f"latency {case.key}")],
        "training": [f"{what}{key}{how}" for key in plain for what in ("", "profile ") for how in ("", " compiled")],
        "students": ["KD, seed 0", "no KD, seed 0"],
        "sanitizer": [f"{tool} {group}" for tool in ("memcheck", "racecheck") for group in tools.GROUPS],
        "gradients": gradients.cases("cuda"),
        "selection": ["cache float32", "cache bfloat16", *selection.if_beta_cases("cuda")],
        "peers": peers.cases("cuda"),
    }
    assert {part for part, _ in asked.keys} <= {part.name for part in parts("cuda")}
    missing = {(part, key) for part, key in asked.keys if key not in known[part]}
    assert not missing
