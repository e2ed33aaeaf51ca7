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


@pytest.fixture(scope="module")
def grid():
    """Failures of each divergence."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(GRID), "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", ["jsd", "dkd", "standardized", "special", "own numbers"])
def test_interpreted(grid, name):
    count, failures = grid[name]
    assert count > 0
    assert not failures, failures[:10]
