"""Several processes compute what one computes, up to rounding, whatever their number."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

RunWork = Callable[..., None]
# Largest difference to one process, relative to the norm of an array.
EXACT, ROUNDING = 1e-12, 1e-5


def run_both(run_work: RunWork, processes: int, names: str, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the arrays of one process, and those of several, by the name of the work."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in names.split(",")}
    for count in (1, processes):
        place = folder / str(count)
        place.mkdir()
        run_work(count, names, place)
        for name, arrays in found.items():
            with np.load(place / f"{name}.npz") as file:
                arrays.append(dict(file))
    return found


def check_close(name: str, expected: dict[str, Any], got: dict[str, Any], tolerance: float) -> None:
    assert set(got) == set(expected)
    # The gradient of a bias before a batch norm vanishes but for rounding, and has no size of its own.
    largest = max(float(np.linalg.norm(value)) for value in expected.values())
    for key, value in expected.items():
        difference = np.linalg.norm(got[key].astype(np.float64) - value)
        size = float(np.linalg.norm(value)) if tolerance > EXACT else largest
        assert difference <= tolerance * size, (name, key, difference, size)


def check_training(found: dict[str, list[dict[str, Any]]]) -> None:
    for name, (expected, got) in found.items():
        check_close(name, expected, got, EXACT if name in ("normalize", "gather") else ROUNDING)


def check_record(expected: dict[str, Any], got: dict[str, Any]) -> None:
    for name in ("correct", "batches"):
        assert expected[name].any()
        assert np.array_equal(got[name], expected[name])
    for name in ("el2n", "margin", "features"):
        np.testing.assert_allclose(got[name], expected[name], rtol=2e-3, atol=2e-3)


def test_two_processes_train_the_same_network(run_work: RunWork, tmp_path: Path) -> None:
    check_training(run_both(run_work, 2, "normalize,gather,distill,relate,mix,average,draw", tmp_path))


def check_bytes(expected: dict[str, Any], got: dict[str, Any]) -> None:
    assert set(got) == set(expected)
    assert all(np.array_equal(got[name], value) for name, value in expected.items())


def test_two_processes_record_score_and_cache_the_same(run_work: RunWork, tmp_path: Path) -> None:
    found = run_both(run_work, 2, "record,score,cache", tmp_path)
    check_record(*found.pop("record"))
    check_bytes(*found.pop("cache"))
    check_training(found)


@pytest.mark.slow
def test_four_processes(run_work: RunWork, tmp_path: Path) -> None:
    found = run_both(run_work, 4, "normalize,gather,distill,relate,mix,record,score,cache", tmp_path)
    check_record(*found.pop("record"))
    check_bytes(*found.pop("cache"))
    check_training(found)
