"""bench/count_cuda.py, and what it shows of the CUDA kernels: no spills, and a main loop that mostly multiplies."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")  # its cuobjdump
pytestmark = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc")

BENCH = Path(__file__).parents[2] / "bench"
# Least share of multiply-adds among the instructions of the main loop, and fewest warps of a multiprocessor.
BOUNDS = {
    "direct 8": (0.58, 16), "direct 4": (0.48, 20), "direct 2": (0.34, 24), "gram": (0.52, 16),
    "direct_elements 8": (0.58, 16), "direct_elements 4": (0.48, 20), "direct_elements 2": (0.34, 24),
}  # fmt: skip


@pytest.mark.parametrize("arch", [80, 90])
def test_main_loops_of_the_kernels(tmp_path, arch):
    command = [sys.executable, "count_cuda.py", "--arch", str(arch)]
    environment = {**os.environ, "KDFAST_RESULTS": str(tmp_path)}
    done = subprocess.run(command, cwd=BENCH, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "cuda_counts.json").read_text())["rows"]
    for kernel, (share, warps) in BOUNDS.items():
        found = [row for row in rows if row["kernel"].startswith(kernel)]
        assert len(found) == (2 if kernel.startswith("direct ") else 4)
        for row in found:
            assert row["stack"] == row["loops"] == 0, row
            assert row["share"] >= share, row
            assert row["warps"] >= warps, row
    assert str(rows[0]["instructions"]) in done.stdout
