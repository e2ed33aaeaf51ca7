import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from kdfast.errors import DataError
from kdfast.sweep.report import report_sweep, table
from kdfast.sweep.results_log import ResultsLog
from kdfast.sweep.summary import group_rows, half_width


def row(method: str, seed: int, top1: float, *, kd: bool = True, fraction: float = 0.1, **settings) -> dict:
    common = {"data": "f" * 64, "student": "resnet8", "steps": 10, "views": 0, "method": method, "fraction": fraction}
    common |= {"kd": kd, "seed": seed, "cache": "c" if kd else None, **({"alpha": "auto"} if kd else {}), **settings}
    key = f"{method}-{seed}-{kd}-{fraction}-{sorted(settings.items())}"
    return {"key": key, "method": method, "fraction": fraction, "kd": kd, "seed": seed, "test_top1": top1,
            "kept": 100, "steps": 10, "seconds": 1.0, "settings": common}  # fmt: skip


RANDOM, OURS = [40.0, 41.5, 39.0], [42.0, 42.5, 42.0]
ROWS = [row("random", s, v) for s, v in enumerate(RANDOM)] + [row("el2n", s, v) for s, v in enumerate(OURS)]


def test_interval_equals_that_of_a_paired_t_test() -> None:
    (section,) = group_rows(ROWS)
    gap = section.difference("el2n", 0.1, kd=True)
    assert gap is not None
    low, high = stats.ttest_rel(OURS, RANDOM).confidence_interval(0.95)
    assert gap.mean - gap.half_width == pytest.approx(low)
    assert gap.mean + gap.half_width == pytest.approx(high)
    assert gap.n == 3
    assert section.difference("random", 0.1, kd=True) is None
    assert math.isnan(half_width(np.array([1.0])))


def test_compares_only_common_seeds() -> None:
    (section,) = group_rows([*ROWS, row("dual", 2, 50.0), row("dual", 7, 0.0), row("d2", 9, 1.0)])
    gap = section.difference("dual", 0.1, kd=True)
    assert gap is not None
    assert (gap.mean, gap.n) == (11.0, 1)
    assert not gap.is_significant, "one seed has no interval"
    assert section.difference("d2", 0.1, kd=True) is None
    assert section.difference("dual", 0.1, kd=False) is None


def test_separates_other_settings_and_shares_rows_without_the_teacher() -> None:
    plain = [row("random", 0, 30.0, kd=False), row("el2n", 0, 20.0, kd=False, cache="c")]
    found = group_rows([*ROWS, *plain, row("random", 0, 1.0, alpha="0.5"), row("random", 0, 2.0, kd=False, steps=11)])
    assert [len(section.rows) for section in found] == [8, 3, 1]
    assert found[0].top1["el2n", 0.1, False] == found[1].top1["el2n", 0.1, False] == {0: 20.0}
    assert found[1].top1["random", 0.1, True] == {0: 1.0}
    assert found[2].settings["steps"] == 11


def test_runs_whose_scores_have_other_inputs_are_not_averaged() -> None:
    old = [row("el2n", seed, 1.0, scores="old") for seed in range(3)]
    new = [row("el2n", seed, 2.0, scores="new") for seed in (0, 7)]
    (section,) = group_rows([*ROWS[:3], *old, *new])
    assert section.top1["el2n", 0.1, True] == {0: 2.0, 7: 2.0}
    assert section.top1["random", 0.1, True] == dict(enumerate(RANDOM))
    assert "Left out: 3 runs with other inputs or another length than the last run of the method." in table(section)
    assert "Left out" not in table(group_rows(ROWS)[0])


def test_table_ranks_methods_and_names_clear_differences() -> None:
    worse = [row("forgetting", s, v - 10) for s, v in enumerate(RANDOM)]
    (section,) = group_rows([*ROWS, *worse])
    text = table(section)
    (ours,) = (line for line in text.splitlines() if line.startswith("| el2n"))
    assert ours == "| el2n | **42.17** ± 0.29 (3) | +2.00 [-0.48, +4.48] |"
    assert "random is number 2 of 3, el2n is first; clearly better than random: none; clearly worse: forgetting" in text
    assert "too few seeds" not in text
    assert "without the teacher" not in text


def test_table_judges_no_method_by_one_seed() -> None:
    (section,) = group_rows([*ROWS, row("dual", 2, 50.0)])
    assert "clearly better than random: none; clearly worse: none; of too few seeds to say: dual." in table(section)


def test_writes_table_and_plot(tmp_path: Path) -> None:
    log = ResultsLog(tmp_path)
    for item in [*ROWS, *(row("random", 0, 30.0, kd=False, fraction=f) for f in (0.1, 0.5))]:
        log.append(item)
    text = report_sweep(tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    with Image.open(tmp_path / "plot.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(1 << 20)}
    assert {(31, 119, 180), (255, 127, 14)} <= colors


def test_rejects_a_folder_without_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no row"):
        report_sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_rows_with_other_terms_are_other_tables() -> None:
    terms = [{"name": "dkd", "weight": 2.0, "options": {"alpha": 1.0, "beta": 8.0}}]
    with_term = [row("random", s, v, terms=terms, ce=1.0) for s, v in enumerate(RANDOM)]
    plain = [row("random", s, v, kd=False) for s, v in enumerate(OURS)]
    first, second = group_rows([*ROWS, *with_term, *plain])
    assert "dkd" not in table(first)
    assert r"ce 1.0, alpha auto, terms 2 dkd (alpha=1, beta=8)" in table(second).replace("\\", "")
    assert all(section.top1["random", 0.1, False] == dict(enumerate(OURS)) for section in (first, second))
