"""Errors of the kernels against float64 for extreme logits: they may be at most FACTOR times those of PyTorch.

test_extreme_logits.py uses this module, and runs it as a program for the Triton kernels. Its arguments are the backend,
the device and numbers of classes; it prints the number of checks and the failures as JSON.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import one_hot

import kdfast
from kdfast.ops.kd_loss import topk_teacher

FACTOR = 5  # the errors are maxima of few rounding errors
OPTIONS = {
    "forward": {},
    "reverse": {"direction": "reverse"},
    "jsd": {"divergence": "jsd", "jsd_beta": 0.3},
    "dkd": {"divergence": "dkd", "dkd_weights": (0.7, 3.0)},
    "standardized": {"divergence": "standardized"},
    "top-5 forward": {},
    "top-5 reverse": {"direction": "reverse"},
}


def pairs(classes: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield names, and float32 logits (3, C) of student and teacher."""

    def logits(spread: float = 1.0) -> Tensor:
        return spread * torch.randn(3, classes)

    yield "almost equal classes", 5 + 1e-3 * logits(), 5 + 1e-3 * logits()
    yield "a student of almost equal classes", 5 + 1e-3 * logits(), logits(3)
    z = logits(3)
    yield "almost equal networks", z, z + 1e-3 * logits()
    yield "offsets", 1e4 + logits(3), -1e4 + logits(3)
    ids = one_hot(torch.randint(0, classes, (3,)), classes)
    for top in (12, 30):
        yield f"one class {top} above the others", logits() + top * ids, logits() + top * ids
    yield "a class each", logits() + 50 * one_hot(torch.randint(0, classes, (3,)), classes), logits() + 50 * ids


def results(z: Tensor, *args: object, **options: object) -> tuple[Tensor, Tensor]:
    """Return loss and gradient in float64."""
    z = z.detach().requires_grad_()
    loss = kdfast.kd_loss(z, *args, **options)
    return loss.detach().double(), torch.autograd.grad(loss.sum(), z)[0].double()


def failures(backend: str, classes: int, name: str) -> tuple[int, list[str]]:
    """Return the number of checks of one kind of loss, and what failed.

    An error counts relative to the largest element, or to what is added up to get it if that is larger: terms near
    T^2 for a loss, and T times the largest probability for a gradient.
    """
    count, failed = 0, []
    for (place, z, teacher), t, alpha in itertools.product(pairs(classes), (1.0, 4.0), (0.5, 1.0)):
        labels = z.argmax(1)
        args = labels, topk_teacher(teacher, 5, t) if name.startswith("top") else teacher
        options = {"temperature": t, "alpha": alpha, "reduction": "none", **OPTIONS[name]}
        truth = results(z.double(), *args, **options, backend="reference")
        largest = max(1 - alpha, float(torch.softmax(teacher / t, 1).max()), float(torch.softmax(z / t, 1).max()))
        floors = 0.1 * t**2, 0.02 * t * largest
        ours, eager = (
            [
                ((a - b).abs().max() / b.abs().max().clamp_min(f)).item()
                for a, b, f in zip(x, truth, floors, strict=True)
            ]
            for x in (results(z, *args, **options, backend=backend), results(z, *args, **options, backend="reference"))
        )
        count += 1
        if not all(a <= FACTOR * b + 1e-6 for a, b in zip(ours, eager, strict=True)):
            failed.append(f"{name}, {place}, C = {classes}, T = {t}, alpha = {alpha}: {ours}, PyTorch {eager}")
    return count, failed


if __name__ == "__main__":
    backend, device, *sizes = sys.argv[1:]
    torch.set_default_device(device)
    torch.manual_seed(0)
    found = [failures(backend, int(c), name) for c in sizes for name in OPTIONS]
    print(json.dumps([sum(count for count, _ in found), [line for _, lines in found for line in lines]]))
