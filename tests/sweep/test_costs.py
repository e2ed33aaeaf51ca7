"""The seconds of a row, stage by stage, against sums by hand."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kdfast.distillation.record_dynamics import TRAINING_FOLDER
from kdfast.files import write_sealed
from kdfast.pruning.select import Selection
from kdfast.sweep.costs import known_seconds, row_seconds, stage_seconds

RESULT = {
    "test_top1": 1.0, "test_top5": 1.0, "test_loss": 1.0, "steps": 1, "images": 1, "images_per_second": 1.0, "kept": 1,
    "alpha": 0.0, "views": 1, "loader": "resident", "targets": None, "weights": "0" * 64,
}  # fmt: skip


class Cache:
    """100 samples in 5 views, which took 50 seconds: 0.1 seconds for each image."""

    is_imported = False
    manifest: dict[str, float] = {"seconds": 50.0}  # noqa: RUF012
    n_views = 5

    def __len__(self) -> int:
        return 100


class Imported(Cache):
    is_imported = True


def sources(cache: Any = None, recorded: Any = None) -> Any:
    return SimpleNamespace(cache=cache, dynamics=recorded, digests={"cache": "c", "dynamics": "d"})


def selection(used: dict[str, str], parameters: dict[str, Any] | None = None, **times: float) -> Selection:
    provenance = {"method": "m", "sources": used, "parameters": {"score": parameters or {}}, **times}
    return Selection(0.2, np.arange(20), provenance, {}, 1.0)


def test_a_random_subset_needs_its_share_of_the_cache() -> None:
    chosen = selection({}, seconds=0.75, score_seconds=0.25)
    found = stage_seconds(chosen, sources(Cache()), views=5)
    assert found == {"scores": 0.25, "cache": pytest.approx(20 * 5 * 0.1), "selection": 0.5}
    assert stage_seconds(chosen, sources(Cache()), views=0) == {"scores": 0.25, "selection": 0.5}


def test_a_score_of_the_cache_needs_one_view_of_every_sample() -> None:
    chosen = selection({"cache": "c"}, seconds=1.0, score_seconds=0.25)
    with_teacher = stage_seconds(chosen, sources(Cache()), views=3)
    assert with_teacher["cache"] == pytest.approx((20 * 3 + 80) * 0.1), "one view of the kept is among theirs"
    without = stage_seconds(chosen, sources(Cache()), views=0)
    assert without["cache"] == pytest.approx(100 * 0.1)


@pytest.mark.parametrize("cache", [Imported(), Cache()])
def test_the_time_of_other_or_imported_logits_is_unknown(cache: Cache) -> None:
    digest = "c" if cache.is_imported else "another cache"
    chosen = selection({"cache": digest}, seconds=1.0, score_seconds=0.25)
    assert stage_seconds(chosen, sources(cache), views=5)["cache"] is None


def test_dynamics_count_the_training_of_every_run(tmp_path: Path) -> None:
    for run, seconds in enumerate((3.0, 4.5)):
        folder = tmp_path / f"run-{run:02d}" / TRAINING_FOLDER
        folder.mkdir(parents=True)
        write_sealed(folder / "result.json", {**RESULT, "seconds": seconds})
    recorded = SimpleNamespace(path=tmp_path, runs=2)
    chosen = selection({"dynamics": "d"}, seconds=1.0, score_seconds=1.0)
    others = selection({"dynamics": "another recording"}, seconds=1.0, score_seconds=1.0)
    known = sources(recorded=recorded)
    assert stage_seconds(others, known, views=0)["dynamics"] is None
    assert stage_seconds(chosen, known, views=0)["dynamics"] == 7.5
    (tmp_path / "run-01" / TRAINING_FOLDER / "result.json").unlink()
    assert stage_seconds(chosen, known, views=0)["dynamics"] is None, "recorded in a loop of one's own"


def test_flattening_and_scores_of_other_programs_are_unknown() -> None:
    flattened = selection({}, {"network": "flattened, sharpness fsam"}, seconds=7.0, score_seconds=6.0)
    assert stage_seconds(flattened, sources(), views=0) == {"flatten": None, "scores": 6.0, "selection": 1.0}
    own = selection({}, {"read_as": "scores.npy", "higher": "hard"}, seconds=1.0, score_seconds=0.0)
    assert stage_seconds(own, sources(), views=0) == {"scores": None, "selection": 1.0}


def test_a_selector_without_a_score_has_only_its_own_time() -> None:
    assert stage_seconds(selection({}, seconds=2.0), sources(), views=0) == {"selection": 2.0}


def test_the_sum_of_a_row_leaves_out_what_is_unknown() -> None:
    row = {"seconds": 10.0, "costs": {"selection": 0.5, "scores": None, "cache": 4.0, "dynamics": 100.0}}
    assert list(row_seconds(row)) == ["dynamics", "scores", "cache", "selection", "training"]
    assert known_seconds(row) == 114.5
    assert row_seconds({"seconds": 10.0, "subset_seconds": 2.0}) == {"selection": 2.0, "training": 10.0}
    assert known_seconds({"seconds": 10.0}) == 10.0
