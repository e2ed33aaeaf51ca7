"""Per-sample gradient norms of whole networks: kdfast compared with opacus and torch.func.

    python bench/bench_grad_norms.py [--rounds 7] [--threads N] [--nets resnet18 depthwise] [--part network layers]
                                     [--device cuda]

Every implementation receives the same network, batch and loss, and returns the norm of each sample's gradient over all
parameters. Each one is checked against float64 autograd before it is timed. Implementations are timed in turn; a ratio
is the median over rounds, with quartiles. The baselines are opacus (`ghost`: its fast gradient clipping, one backward
pass, norms without clipping; `per-sample`: its materialized gradients) and `torch.func` (vmap over grad, in chunks that
fit). `network` times forward, backward and norms. `layers` times only the norms of the convolutions, from their inputs
and output gradients; for opacus, by its registered function. Peak memory is the increase of the resident set during one
call in a separate process; on a GPU, of the allocated memory. Networks and batches are the same on both devices, TF32
is off, and the thresholds apply to a CPU. opacus does not support batch norm, so the networks use group norm.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import kdfast
from kdfast.ops.grad_norms import reference
from kdfast.ops.grad_norms.dispatch import squared_norms
from kdfast.ops.grad_norms.layers import LAYERS

sys.path.insert(0, str(Path(__file__).parent))

from harness import cuda_peak, interleave, machine, table, write_results

Call = Callable[[], Tensor]
# Minimum speedup over opacus on a CPU, for the norms alone.
BARS = {("resnet18", "layers"): 2.0, ("resnet18-imagenet", "layers"): 2.0, ("depthwise", "layers"): 5.0}


class Block(nn.Module):
    """Basic block of a ResNet, with group norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(32, outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(32, outputs)
        same = stride == 1 and inputs == outputs
        self.down = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) -> (B, outputs, h / stride, w / stride)."""
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + (x if self.down is None else self.down(x)))


class Separable(nn.Sequential):
    """Depthwise 3x3 and pointwise convolution, as in MobileNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
            nn.GroupNorm(32, inputs),
            nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.GroupNorm(32, outputs),
            nn.ReLU(),
        )


def resnet18(imagenet: bool) -> nn.Module:
    """Build an 18-layer ResNet for 32x32 or for large images."""
    stem: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.GroupNorm(32, 64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    if not imagenet:
        stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    stages = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    stages += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000 if imagenet else 10)]
    return nn.Sequential(*stem, *(Block(*stage) for stage in stages), *pool)


def depthwise() -> nn.Module:
    """Build a network of depthwise separable convolutions for 32x32 images."""
    stages = [(64, 128, 1), (128, 128, 1), (128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1), (512, 512, 1)]
    stem = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.GroupNorm(32, 64), nn.ReLU()]
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10)]
    return nn.Sequential(*stem, *(Separable(*stage) for stage in stages), *pool)


# Builder, image side length, batch size.
NETS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet18": (lambda: resnet18(False), 32, 16),
    "depthwise": (depthwise, 32, 16),
    "resnet18-imagenet": (lambda: resnet18(True), 224, 4),
}


def build(name: str, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return network, images and labels, equal for every call and device."""
    torch.manual_seed(0)
    maker, side, n = NETS[name]
    model = maker().train()  # opacus records in training mode only; no layer here depends on the mode
    return model.to(device), torch.randn(n, 3, side, side).to(device), torch.randint(0, 10, (n,)).to(device)


def contenders(name: str, device: str) -> dict[str, Call]:
    """Return calls that compute the norms, by name; kdfast comes first."""
    model, x, y = build(name, device)
    found: dict[str, Call] = {"kdfast": lambda: kdfast.grad_norms(model, x, y)}
    found |= opacus_contenders(name, device)
    found["vmap"] = vmapped(*build(name, device))
    return found


def opacus_contenders(name: str, device: str) -> dict[str, Call]:
    """Return the two methods of opacus, if it is installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    except ImportError:
        return {}
    model, x, y = build(name, device)
    ghost = GradSampleModuleFastGradientClipping(model, loss_reduction="sum", max_grad_norm=1.0)
    other, _, _ = build(name, device)
    full = GradSampleModule(other, loss_reduction="sum")

    def norms() -> Tensor:
        F.cross_entropy(ghost(x), y, reduction="sum").backward()
        out: Tensor = ghost.get_norm_sample()
        ghost.zero_grad()
        return out

    def per_sample() -> Tensor:
        F.cross_entropy(full(x), y, reduction="sum").backward()
        out = torch.stack([p.grad_sample.flatten(1).norm(dim=1) for p in full.parameters()]).norm(dim=0)
        full.zero_grad()
        return out

    return {"opacus ghost": norms, "opacus per-sample": per_sample}


def vmapped(model: nn.Module, x: Tensor, y: Tensor, metric: dict[str, Tensor] | None = None) -> Call:
    """Return a call that uses torch.func: vmap over grad, with 0.25 GiB (GPU: 4 GiB) of gradients at a time."""
    params = {name: p.detach() for name, p in model.named_parameters()}

    def loss(q: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, q, (image.unsqueeze(0),)), label.unsqueeze(0))

    def norm(q: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        squares = {name: g.square() for name, g in grad(loss)(q, image, label).items()}
        if metric is not None:
            squares = {name: square / metric[name] for name, square in squares.items()}
        return torch.stack([square.sum() for square in squares.values()]).sum().sqrt()

    memory = 2**32 if x.is_cuda else 2**28
    size = sum(p.numel() * p.element_size() for p in params.values())
    many = vmap(norm, (None, 0, 0), chunk_size=max(1, memory // size))
    return lambda: many(params, x, y)


def truth(name: str) -> Tensor:
    """Compute the norms of the first two samples by float64 autograd on the CPU, one sample at a time."""
    model, x, y = build(name, "cpu")
    model.double()
    out = []
    for i in range(2):
        loss = F.cross_entropy(model(x[i : i + 1].double()), y[i : i + 1])
        out.append(torch.stack([g.square().sum() for g in torch.autograd.grad(loss, list(model.parameters()))]).sum())
    return torch.stack(out).sqrt()


def check(calls: dict[str, Call], expected: Tensor, device: str) -> dict[str, float]:
    """Return the relative errors of the first samples; raise if one exceeds float32 rounding over many layers."""
    errors = {
        name: ((call()[: len(expected)].cpu() - expected).abs() / expected).max().item() for name, call in calls.items()
    }
    limit = 1e-5 if device == "cpu" else 1e-4  # cuDNN may select less accurate algorithms, such as Winograd's
    for name, error in errors.items():
        if not error < (limit if name == "kdfast" else 1e-3):
            raise AssertionError(f"{name} is wrong: relative error {error:.1e}")
    return errors


def recorded_convolutions(
    name: str, keep: Callable[[nn.Conv2d], bool], device: str
) -> list[tuple[nn.Conv2d, Tensor, Tensor]]:
    """Return the convolutions with their inputs and output gradients."""
    model, x, y = build(name, device)
    seen: list[tuple[nn.Conv2d, Tensor, Tensor]] = []
    outputs: list[Tensor] = []

    def hook(layer: nn.Conv2d, args: tuple[Tensor, ...], out: Tensor) -> None:
        if keep(layer):
            seen.append((layer, args[0].detach(), out))
            outputs.append(out)

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(hook)
    grads = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), outputs)
    return [(layer, a, b.contiguous()) for (layer, a, _), b in zip(seen, grads, strict=True)]


def layer_contenders(name: str, device: str) -> tuple[dict[str, Call], Tensor]:
    """Return calls that compute the convolutions' norms from recorded tensors, and the float64 norms."""
    calls = recorded_convolutions(
        name, (lambda layer: layer.groups > 1) if name == "depthwise" else (lambda layer: True), device
    )
    factors = [LAYERS[nn.Conv2d](*call)["weight"] for call in calls]
    exact = [LAYERS[nn.Conv2d](layer, a[:2].double(), b[:2].double())["weight"]() for layer, a, b in calls]
    expected = torch.stack([reference.squared_norms(each, "direct") for each in exact]).sum(0).sqrt().cpu()
    found: dict[str, Call] = {"kdfast": lambda: torch.stack([squared_norms(each()) for each in factors]).sum(0).sqrt()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from opacus.grad_sample.conv import compute_conv_grad_sample
    except ImportError:
        return found, expected

    def opacus() -> Tensor:
        norms = [compute_conv_grad_sample(layer, [a], b)[layer.weight].flatten(1).norm(dim=1) for layer, a, b in calls]
        return torch.stack(norms).norm(dim=0)

    return {**found, "opacus": opacus}, expected


PEAK = """
import sys, torch
sys.path.insert(0, {folder!r})
torch.set_num_threads({threads})
import {module} as b
call = b.contenders({name!r}, "cpu")[{what!r}]
call()
open("/proc/self/clear_refs", "w").write("5")
read = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
before = read("VmRSS")
call()
print((read("VmHWM") - before) / 2**20)
"""


def peak(name: str, what: str, call: Callable[[], Any], device: str, module: str = "bench_grad_norms") -> str:
    """Return the increase in memory use in MB during a call after the first, one of the `contenders` of a module."""
    if device == "cuda":
        return f"{cuda_peak(call) / 2**20:.0f}"
    if not sys.platform.startswith("linux"):
        return ""
    folder, threads = str(Path(__file__).parent), torch.get_num_threads()
    code = PEAK.format(folder=folder, module=module, name=name, what=what, threads=threads)
    run = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return f"{float(run.stdout.split()[-1]):.0f}"


def measure(name: str, part: str, rounds: int, device: str) -> list[dict[str, Any]]:
    """Return one table row per implementation."""
    whole = part == "network"
    calls, expected = (contenders(name, device), truth(name)) if whole else layer_contenders(name, device)
    errors = check(calls, expected, device)
    timings = interleave(calls, rounds, device=device)
    rows = []
    for what, timing in timings.items():
        ratio = timings["kdfast"].ratio_to(timing)
        bar = BARS.get((name, part)) if what == "opacus" and device == "cpu" else None
        rows.append(
            {
                "net": name,
                "part": part,
                "N": NETS[name][2],
                "what": what,
                "ms": f"{timing.median * 1e3:.1f}",
                "samples/s": f"{NETS[name][2] / timing.median:.1f}",
                "kdfast is faster": "" if what == "kdfast" else f"{ratio[0]:.2f}x ({ratio[1]:.2f}-{ratio[2]:.2f})",
                "bar": "" if bar is None else f">= {bar:g}x {'met' if ratio[0] >= bar else 'MISSED'}",
                "error": f"{errors[what]:.0e}",
                "peak MB": peak(name, what, calls[what], device) if whole else "",
            }
        )
    return rows


def main() -> None:
    """Print the table and write bench/results/grad_norms*.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--nets", nargs="*", default=["resnet18", "depthwise", "resnet18-imagenet"], choices=list(NETS))
    parser.add_argument("--part", nargs="*", default=["network", "layers"], choices=["network", "layers"])
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # opacus warns about full backward hooks
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device == "cuda":  # on by default for convolutions, in some containers also for matrix products
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    topic = "grad_norms" if options.device == "cpu" else "grad_norms_cuda"
    rows: list[dict[str, Any]] = []
    for name in options.nets:
        for part in options.part:
            found = measure(name, part, options.rounds, options.device)
            print(table(found), flush=True)
            rows += found
            # Write after each part, so that an interrupted run keeps its results.
            path = write_results(topic, rows, rounds=options.rounds, opacus=opacus_version())
    print(f"\n{table(rows)}\n{machine()}\n{path}")


def opacus_version() -> str | None:
    """Return the installed version of opacus, or None."""
    from importlib import metadata

    try:
        return metadata.version("opacus")
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
