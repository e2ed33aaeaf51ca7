"""Run the Triton kernels in place, and `linear_kd_loss` on them, and print what differs; needs TRITON_INTERPRET=1."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

import kdfast
from kdfast.ops.kd_loss.dispatch import run_kernel

sys.path.append(str(Path(__file__).parents[2]))
sys.path.append(str(Path(__file__).parent))
import triton_interpreter  # noqa: F401  (corrects the interpreter)
from in_place import DIVERGENCES, make_kernel_call

failures = []
count = 0
# 9,000 classes are several tiles.
cases = [(kind, 20, torch.bfloat16) for kind in DIVERGENCES]
cases += [(kind, 9000, torch.float32) for kind in ("kl", "reverse", "jsd", "topk")]
for kind, c, dtype in cases:
    call = make_kernel_call(kind, 2, c, dtype)
    loss, grad = run_kernel("triton", call, True)
    z = call.logits.clone()
    loss_in_place, _ = run_kernel("triton", call.replace(logits=z), True, grad=z)
    count += 1
    if not (torch.equal(loss, loss_in_place) and torch.equal(grad, z)):
        failures.append(f"{kind} {c} {dtype}: not the same in place")

for softcap in (None, 3.0):
    hidden, weight = torch.randn(5, 4, requires_grad=True), torch.randn(33, 4, requires_grad=True)
    labels, teacher = torch.tensor([1, -100, 32, 0, 5]), (torch.randn(5, 3), torch.randn(33, 3))
    results = []
    for backend in ("triton", "native"):
        loss = kdfast.linear_kd_loss(hidden, weight, labels, teacher, softcap=softcap, chunk=2, backend=backend)
        results.append((loss.detach(), *torch.autograd.grad(loss, (hidden, weight))))
    count += 1
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*results, strict=True)):
        failures.append(f"linear_kd_loss, softcap {softcap}: differs from native")
print(json.dumps({"count": count, "failures": failures}))
