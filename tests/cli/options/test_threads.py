"""The commands choose OpenMP's settings before torch is loaded, unless the user has."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kdfast.cli import threads


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment without settings of threads, which the test may change."""
    kept = {k: v for k, v in os.environ.items() if k not in (*threads.WAIT_SETTINGS, "OMP_NUM_THREADS")}
    monkeypatch.setattr(os, "environ", kept)
    return kept


def limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str) -> None:
    file = tmp_path / "cpu.max"
    file.write_text(text)
    monkeypatch.setattr(threads, "_CPU_LIMITS", (file, tmp_path / "none"))


def test_threads_sleep_while_they_wait(environment: dict[str, str]) -> None:
    threads.configure_threads()
    assert environment["GOMP_SPINCOUNT"] == "1000"


@pytest.mark.parametrize("name", threads.WAIT_SETTINGS)
def test_settings_of_the_user_stay(environment: dict[str, str], name: str) -> None:
    environment |= {name: "7", "OMP_NUM_THREADS": "5"}
    before = dict(environment)
    threads.configure_threads()
    assert environment == before


@pytest.mark.parametrize(
    ("text", "threads_set"),
    [
        ("150000 100000", "1"),
        ("350000 100000", "3"),
        ("20000 100000", "1"),
        ("max 100000", None),
        ("800000 100000", None),
    ],
)
def test_threads_fit_the_limit_of_a_container(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, threads_set: str | None
) -> None:
    limit(monkeypatch, tmp_path, text)
    monkeypatch.setattr(threads, "_usable_cores", lambda: 8)
    threads.configure_threads()
    assert environment.get("OMP_NUM_THREADS") == threads_set


def test_limit_of_the_older_control_groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quota, period = tmp_path / "quota", tmp_path / "period"
    quota.write_text("250000\n")
    period.write_text("100000\n")
    monkeypatch.setattr(threads, "_CPU_LIMITS", (tmp_path / "none", quota))
    monkeypatch.setattr(threads, "_PERIOD", period)
    assert threads.cpu_limit() == 2.5
    quota.write_text("-1\n")
    assert threads.cpu_limit() == float("inf")


def test_doctor_shows_the_settings(environment: dict[str, str]) -> None:
    out = subprocess.run(
        [sys.executable, "-m", "kdfast", "doctor"], env=environment, capture_output=True, text=True, check=True
    ).stdout
    assert "waiting: GOMP_SPINCOUNT=1000" in out


def test_library_sets_nothing(environment: dict[str, str]) -> None:
    code = "import os, kdfast, kdfast.distillation.train; print(os.environ.get('GOMP_SPINCOUNT'))"
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "None"
