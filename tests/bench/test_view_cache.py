"""The benchmark of a large cache runs on few samples, checks the rows and writes its result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import bench_view_cache


def test_writes_its_result(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_view_cache.harness, "RESULTS", tmp_path)
    options = ["--samples", "600", "--folder", str(tmp_path / "cache")]
    steps = []
    for _ in range(2):
        rows = json.loads(bench_view_cache.main(options).read_text())["rows"]
        steps.append([row["step"].split(",")[0] for row in rows])
    assert steps == [["write", "open", "read", "read"], ["open", "read", "read"]]
    assert 0 < rows[0]["bytes_of_views"] - 600 * 4 * 42 < 512  # the header of one file
