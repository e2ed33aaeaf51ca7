"""bench/gpu.sh without a GPU: every part runs even if others fail, and keeps its results."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "bench" / "gpu.sh"
# Replaces Python: logs its arguments and runs the command in the variable of the called part.
FAKE_PYTHON = """#!/usr/bin/env bash
echo "$@" >>"$KDFAST_RESULTS/../calls"
case "$*" in
  *kd_loss*) echo '{"rows": []}' >"$KDFAST_RESULTS/kd_loss_cuda.json"; ${AT_KD_LOSS:-true} ;;
  *pytest*) ${AT_TESTS:-true} ;;
  *pip*) ${AT_BUILD:-true} ;;
esac
"""


@pytest.fixture
def run(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def call(**environment):
        (tmp_path / "calls").write_text("")
        variables = {**os.environ, "OUT": "results", "PYTHON": str(python), **environment}
        done = subprocess.run(["bash", str(SCRIPT)], cwd=tmp_path, env=variables, capture_output=True, text=True)
        parts = json.loads((tmp_path / "results" / "summary.json").read_text())
        return done, {part["part"]: part["exit"] for part in parts}

    call.out = tmp_path / "results"
    call.calls = tmp_path / "calls"
    return call


def test_runs_all_parts_and_writes_to_out(run):
    done, parts = run()
    assert done.returncode == 0, done.stderr
    assert list(parts)[:4] == ["build", "doctor", "tests", "kd_loss"]
    assert set(parts.values()) == {0}
    calls = run.calls.read_text().splitlines()
    assert len(calls) == len(parts)
    assert "--no-index" in calls[0]  # no network
    assert calls[3] == "bench/bench_kd_loss.py --device cuda"
    assert (run.out / "kd_loss_cuda.json").exists()
    assert "== tests" in (run.out / "gpu.log").read_text()


def test_a_failing_part_does_not_stop_the_others(run):
    done, parts = run(AT_BUILD="false", AT_TESTS="exit 3")
    assert done.returncode == 1
    assert (parts["build"], parts["tests"], parts["kd_loss"]) == (1, 3, 0)
    assert "== tests exited with 3" in done.stdout


def test_stops_a_hanging_part_and_enforces_the_overall_deadline(run):
    done, parts = run(AT_TESTS="sleep 100", DEADLINE="7")
    assert done.returncode == 1
    assert parts["tests"] == 124
    assert parts["kd_loss"] == 124
    assert "== kd_loss: no time left" in done.stdout
