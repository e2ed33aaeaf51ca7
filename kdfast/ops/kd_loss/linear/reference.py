"""``linear_kd_loss`` in plain PyTorch, on the logits of all rows: differentiable more than once, right in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.kd_loss.call import TopKTeacher
from kdfast.ops.kd_loss.linear.call import Layer, LinearTeacher
from kdfast.ops.kd_loss.linear.chunks import no_autocast
from kdfast.ops.kd_loss.linear.validation import Options, make_linear_call
from kdfast.ops.kd_loss.reference import reference_loss
from kdfast.ops.kd_loss.targets.forms import pick_rows

__all__ = ["linear_kd_loss_reference"]


def linear_kd_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    teacher: Tensor | TopKTeacher | LinearTeacher | tuple[Tensor, ...],
    rows: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    alpha: float | Tensor = 0.5,
    temperature: float | Tensor = 4.0,
    t_squared: bool = True,
    divergence: str = "forward",
    beta: float = 0.5,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    weights: Tensor | None = None,
    teacher_kind: str = "logits",
    ignore_index: int = -100,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    reduction: str = "mean",
    num_items: float | Tensor | None = None,
    chunk: int | str = "auto",
    memory: str = "fast",
    backend: str = "auto",
    validate: bool = False,
    group: Any = None,
) -> Tensor:
    """Compute ``linear_kd_loss``, whose arguments it takes; the last five are accepted without effect."""
    options: Options = {
        "bias": bias, "alpha": alpha, "temperature": temperature, "t_squared": t_squared, "divergence": divergence,
        "beta": beta, "label_smoothing": label_smoothing, "class_weights": class_weights, "weights": weights,
        "teacher_kind": teacher_kind, "ignore_index": ignore_index, "softcap": softcap, "logit_scale": logit_scale,
        "reduction": reduction, "num_items": num_items, "chunk": chunk, "memory": memory,
    }  # fmt: skip
    call, _ = make_linear_call(hidden, weight, labels, teacher, rows, options)
    with no_autocast(hidden.device.type):
        z = _logits(call.hidden.to(call.dtype), call.student)
        t = None
        if call.teacher_layer is not None:
            picked = call.teacher if call.rows is None else pick_rows(call.teacher, call.rows)
            t = _logits(picked.to(call.teacher_layer.weight.dtype), call.teacher_layer)
        loss = reference_loss(call.chunk_call(0, z.shape[0], z, t))
    return loss.reshape(hidden.shape[:-1]) if call.reduction == "none" else loss.sum()


def _logits(x: Tensor, layer: Layer) -> Tensor:
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    z = F.linear(x, layer.weight.to(x.dtype), bias) * layer.scale
    return torch.tanh(z / layer.softcap) * layer.softcap if layer.softcap > 0 else z
