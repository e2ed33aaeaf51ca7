"""bench/count_kernels.py: the table, its file, and the comparison of two files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

BENCH = Path(__file__).parents[2] / "bench"
# Counts one case instead of all, in a process of its own, as the command does.
SCRIPT = """
import sys
import count_kernels
from triton_compile import cases
one = cases.dense(100, "bf16", "fp16", "reverse")
other = cases.dense(257)  # no row of the table
cases.cases = lambda: [one, other]
count_kernels.main()
"""


def run(folder, *arguments, script=SCRIPT):
    command = [sys.executable, "-c", script, *map(str, arguments)]
    environment = {"KDFAST_RESULTS": str(folder), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(command, cwd=BENCH, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def main(monkeypatch, capsys):
    """A function that runs the command in this process: arguments -> what it prints."""
    monkeypatch.syspath_prepend(str(BENCH))
    import count_kernels

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["count_kernels.py", *map(str, arguments)])
        count_kernels.main()
        return capsys.readouterr().out

    return call


def test_prints_a_row_and_writes_it(tmp_path):
    done = run(tmp_path, "--copy", "3.0")
    assert done.returncode == 0, done.stderr
    titles, cells = (line.split("  ") for line in done.stdout.splitlines()[:2])
    cells = dict(zip(filter(None, map(str.strip, titles)), filter(None, map(str.strip, cells)), strict=False))
    result = json.loads((tmp_path / "kernel_counts.json").read_text())
    (row,) = result["rows"]
    assert (row["C"], row["dtype"], row["direction"]) == (100, "bf16", "reverse")
    assert row["registers"] >= 16
    assert row["ALU"] < row["instr"]
    assert cells["instr"] == str(row["instr"])
    assert f"{row['ceiling'] / 3.0:.0%}" in done.stdout
    assert f"{row['ceiling'] / 3.0 / 0.9:.2f}" in done.stdout
    assert result["arch"] == 90


def test_counts_another_tree(main, tmp_path):
    with pytest.raises(SystemExit, match="pass a checkout"):
        main("--tree", tmp_path)
    (tmp_path / "kdfast").mkdir()
    (tmp_path / "kdfast" / "__init__.py").write_text("raise RuntimeError('the other tree')")
    done = run(tmp_path, "--tree", tmp_path, script="import count_kernels\ncount_kernels.main()")
    assert "the other tree" in done.stderr


def test_compares_two_files(main, tmp_path):
    row = {
        "C": 100, "dtype": "bf16", "direction": "forward", "tile": "32x128", "warps": 16, "registers": 64, "spilled": 8,
        "instr": 147.0, "ALU": 56.0, "MUFU": 4.5, "barriers": 1, "loops": "", "ceiling": 1.5,
    }  # fmt: skip
    files = []
    for name, arch, changes in (("a", 90, {}), ("b", 90, {"spilled": 0, "ceiling": 3.0}), ("c", 80, {})):
        files.append(tmp_path / f"{name}.json")
        rows = [{**row, **changes}, {**row, "dtype": f"only {name}"}]
        files[-1].write_text(json.dumps({"arch": arch, "rows": rows}))
    printed = main("--compare", files[0], files[1])
    assert len(printed.splitlines()) == 2
    assert "8 > 0" in printed
    assert printed.split()[-1] == "2.00"
    with pytest.raises(SystemExit, match="sm_90 and sm_80"):
        main("--compare", files[0], files[2])
