"""Small calls of every CUDA and Triton kernel, for tools that slow a program down a hundredfold.

    python -m gpu.measure.small_cases GROUP [cpu]

A group named `dense-C` is one call of kd_loss on C classes between the marks that a profiler starts and stops at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import nn

import kdfast
from gpu.measure.kd_loss import DIVERGENCES, Case, gradient, inputs, row_bytes
from kdfast.data.views import Normalization, ViewSpec, apply_views

PROFILED = (1000, 32000)
_PROFILED_BYTES = {"cuda": 1.5e9, "cpu": 1e6}


def kd_loss(device: str) -> None:
    """Each dtype on rows of one tile and of several, the reverse direction, other divergences, and top-k teachers."""
    for c in (7, 100, 1000, 20000):
        for dtype in ("float32", "bfloat16", "float16"):
            gradient(inputs(Case(dtype, c), device, 5))
        gradient(inputs(Case("bfloat16", c, "reverse"), device, 5))
        for name in DIVERGENCES:
            gradient(inputs(Case("bfloat16", c, divergence=name), device, 5))
        if c >= 1000:
            gradient(inputs(Case("float32", c, top_k=True), device, 5))


def grad_norms(device: str) -> None:
    """Convolutions with stride, padding, dilation and groups, norms and a linear layer; also in a metric."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16), nn.Conv2d(16, 24, 1), nn.ReLU(),
        nn.Conv2d(24, 20, 3, dilation=2, padding=2, groups=4), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(80, 10),
    ).to(device)  # fmt: skip
    x, y = torch.randn(4, 3, 16, 16, device=device), torch.arange(4, device=device)
    fisher = kdfast.fisher_diagonal(net, [(x, y)])
    metric = {name: f + f.mean() for name, f in fisher.items()}
    assert kdfast.grad_norms(net, x, y).isfinite().all()
    assert kdfast.grad_norms(net, x, y, metric=metric).isfinite().all()


def softmax_head(device: str) -> None:
    """Norms and Hessian products, one vector and several."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        x, z, y = (value.to(device, dtype) for value in (torch.randn(70, 33), torch.randn(70, 11), torch.zeros(70)))
        assert kdfast.head_grad_norms(z, y.long(), x).isfinite().all()
    x, z = torch.randn(70, 33, device=device), torch.randn(70, 11, device=device)
    for k in (1, 5):
        assert kdfast.head_hvp(x, z, torch.randn(k, 11, 34, device=device), l2=0.1).isfinite().all()


def views(device: str) -> None:
    """Shifts and flips of rows of the images, to each dtype."""
    spec = ViewSpec("shift", (32, 32), pad=4, flip=True)
    images = torch.randint(0, 256, (9, 32, 32, 3), dtype=torch.uint8).to(device)
    view_ids, rows = (torch.tensor([0, 161, 80, 17, 99], device=device), torch.tensor([8, 0, 3, 3, 5], device=device))
    norm = Normalization((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    for dtype in (torch.float32, torch.bfloat16):
        assert apply_views(images, view_ids, spec, norm, rows=rows, dtype=dtype).isfinite().all()


GROUPS: dict[str, Callable[[str], None]] = {
    "kd_loss": kd_loss,
    "grad_norms": grad_norms,
    "softmax_head": softmax_head,
    "views": views,
}


def dense(c: int, device: str) -> None:
    """Call kd_loss once on many rows, after a call that compiles."""
    case = Case("bfloat16", c)
    arguments = inputs(case, device, int(_PROFILED_BYTES[device] // row_bytes(case)) + 1)
    gradient(arguments)
    if device == "cpu":
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    gradient(arguments)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def main(name: str, device: str = "cuda") -> None:
    """Run a group."""
    if name.startswith("dense-"):
        dense(int(name.removeprefix("dense-")), device)
    else:
        GROUPS[name](device)
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
