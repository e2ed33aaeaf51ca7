"""The kernels of `kd_loss` write the gradient over the logits with the same bits as beside them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdfast.ops import backends
from kdfast.ops.kd_loss import native

sys.path.insert(0, str(Path(__file__).parent))

from in_place import DIVERGENCES, make_kernel_call

FOLDER = Path(__file__).parent
needs_native = pytest.mark.skipif(not backends.is_available("kd_loss", "cpu", "native"), reason="needs the extension")


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("classes", [1, 10, 100, 1000, 20000, 100000])
def test_native_kernels_run_in_place(classes, kind, dtype):
    for alphas, smoothing in ((False, 0.0), (True, 0.1)):
        call = make_kernel_call(kind, 3 if classes > 1000 else 19, classes, dtype, alphas, smoothing)
        for isa in (0, 1, 2):
            loss, grad = native.kd_loss(call, True, isa_limit=isa)
            z = call.logits.clone()
            loss_in_place, grad_in_place = native.kd_loss(call.replace(logits=z), True, grad=z, isa_limit=isa)
            assert grad_in_place is z
            torch.testing.assert_close(loss, loss_in_place, rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(grad, z, rtol=0, atol=0, equal_nan=True)


def test_triton_kernels_run_in_place():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(FOLDER / "triton_in_place.py")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["count"] > 0
    assert not result["failures"]
