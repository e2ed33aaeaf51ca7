"""No buffer of size samples x weights: peak memory of a run in a separate process."""

import sys

import pytest

PEAK = """
import torch, kdfast
from torch import nn
torch.set_num_threads(1)
model = {model}
x, y = {inputs}, torch.zeros({n}, dtype=torch.long)
vectors = {{name: torch.ones_like(p) for name, p in model.named_parameters()}}
call = lambda x, y: {call}
call(x[:2], y[:2])
open("/proc/self/clear_refs", "w").write("5")
read = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before = read("VmRSS")
call(x, y)
print(read("VmHWM") - before, {n} * sum(p.numel() for p in model.parameters()) * 4)
"""
CONV = "nn.Sequential(nn.Conv2d(256, 512, 3), nn.Flatten(), nn.Linear(8192, 10))"
SEQUENCE = "nn.Sequential(nn.Linear(1024, 2048), nn.Flatten(), nn.Linear(8192, 10))"
NORMS = "kdfast.grad_norms(model, x, y, method={!r})"
METRIC = "kdfast.grad_norms(model, x, y, metric=vectors)"
FISHER = "kdfast.fisher_diagonal(model, [(x, y)])"
DOTS = "kdfast.grad_dots(model, x, y, vectors)"
TABLE = "nn.Sequential(nn.Embedding(100_000, 16), nn.Flatten(), nn.Linear(64, 10))"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("model", "inputs", "call", "backend"),
    [
        (CONV, "torch.randn(64, 256, 6, 6)", NORMS.format("auto"), "auto"),
        (CONV, "torch.randn(64, 256, 6, 6)", NORMS.format("direct"), "auto"),
        (CONV, "torch.randn(64, 256, 6, 6)", NORMS.format("direct"), "reference"),
        (SEQUENCE, "torch.randn(64, 4, 1024)", NORMS.format("direct"), "reference"),
        (TABLE, "torch.randint(0, 100_000, (64, 4))", NORMS.format("auto"), "auto"),
        (CONV, "torch.randn(64, 256, 6, 6)", METRIC, "auto"),
        (CONV, "torch.randn(64, 256, 6, 6)", FISHER, "auto"),
        (CONV, "torch.randn(64, 256, 6, 6)", DOTS, "auto"),
        (CONV, "torch.randn(64, 256, 6, 6)", METRIC, "reference"),
        (CONV, "torch.randn(64, 256, 6, 6)", FISHER, "reference"),
        (SEQUENCE, "torch.randn(64, 4, 1024)", FISHER, "auto"),
        (TABLE, "torch.randint(0, 100_000, (64, 4))", FISHER, "auto"),
    ],
)
def test_peak_memory_is_far_below_the_size_of_all_gradients(run_program, model, inputs, call, backend):
    code = PEAK.format(model=model, inputs=inputs, n=64, call=call)
    peak, gradients = (int(word) for word in run_program(code, {"KDFAST_BACKEND": backend}).split())
    assert gradients > 2.5e8
    assert peak < gradients / 4
