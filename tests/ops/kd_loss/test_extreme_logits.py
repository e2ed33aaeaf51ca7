"""The errors of the kernels are those of PyTorch for extreme logits, see extreme_logits.py."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.kd_loss.extreme_logits import OPTIONS, failures

PROGRAM = Path(__file__).with_name("extreme_logits.py")


@pytest.mark.parametrize("classes", [20, 9000])
@pytest.mark.parametrize("name", OPTIONS)
def test_errors_are_those_of_pytorch(name: str, classes: int) -> None:
    count, failed = failures("native", classes, name)
    assert count > 0
    assert not failed, "\n".join(failed)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("classes", [pytest.param(c, marks=pytest.mark.slow) for c in (20, 9000)])
def test_errors_of_triton_kernels_are_those_of_pytorch(classes: int) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), "triton", "cpu", str(classes)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    count, failed = json.loads(done.stdout.splitlines()[-1])
    assert count > 0
    assert not failed, "\n".join(failed)
