"""The Triton kernel of the divergences other than KL, without a GPU: see triton_divergences_grid.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

GRID = Path(__file__).with_name("triton_divergences_grid.py")


NAMES = ("jsd", "dkd", "standardized", "special", "own numbers")
# Parts of the grid that take a few seconds in the interpreter.
SHORT = ("options", "indices")


def run_grid(*parts: str) -> dict[str, tuple[int, list[str]]]:
    """Return the count of checks and the failures of each divergence."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(GRID), "cpu", *parts]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, tuple[int, list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("parts", [SHORT, pytest.param((), marks=pytest.mark.slow, id="all")])
def test_interpreted(parts: tuple[str, ...]) -> None:
    grid = run_grid(*parts)
    for name in NAMES if not parts else NAMES[:3]:
        count, failures = grid[name]
        assert count > 0, name
        assert not failures, (name, failures[:10])
