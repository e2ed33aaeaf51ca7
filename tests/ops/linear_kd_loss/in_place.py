"""Calls of the kernels of `kd_loss` for the tests that let them write the gradient over the logits."""

from __future__ import annotations

import torch

from kdfast.ops.kd_loss import topk_teacher
from kdfast.ops.kd_loss.validation import make_call

DIVERGENCES = ("kl", "reverse", "jsd", "dkd", "standardized", "topk", "ce")


def make_kernel_call(kind, n, c, dtype, alphas=False, smoothing=0.0):
    """A checked call without reduction, with weights and an ignored row."""
    g = torch.Generator().manual_seed(c)
    logits = (3 * torch.randn(n, c, generator=g)).to(dtype)
    labels = torch.randint(0, c, (n,), generator=g)
    labels[1] = -100
    teacher = (3 * torch.randn(n, c, generator=g)).half()
    return make_call(
        logits, labels, topk_teacher(teacher.float(), min(5, c), 4.0) if kind == "topk" else teacher, None,
        torch.rand(n, generator=g), alpha=torch.rand(n, generator=g) if alphas else 0.0 if kind == "ce" else 0.5,
        temperature=4.0, t_squared=True, ignore_index=-100, reduction="none",
        direction="reverse" if kind == "reverse" else "forward",
        divergence=kind if kind in ("jsd", "dkd", "standardized") else "kl", jsd_beta=0.3, dkd_weights=(1.0, 2.0),
        label_smoothing=smoothing,
    )  # fmt: skip
