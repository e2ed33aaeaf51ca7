"""Check the arguments of ``linear_kd_loss`` and build a ``LinearCall``; no values of tensors are read."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.kd_loss.call import KDCall, TopKTeacher
from kdfast.ops.kd_loss.linear.call import Layer, LinearCall, LinearTeacher
from kdfast.ops.kd_loss.reference import safe_reciprocal
from kdfast.ops.kd_loss.targets.forms import (
    check_kind,
    flat_labels,
    flat_matrix,
    flat_teacher,
    flat_vector,
    with_class_weights,
)
from kdfast.ops.kd_loss.validation import as_float, as_int, check_tensor, make_call

__all__ = ["Options", "make_linear_call"]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Options = dict[str, Any]
"""The keyword arguments of ``linear_kd_loss``."""


def make_linear_call(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor | None,
    teacher: Tensor | TopKTeacher | LinearTeacher | tuple[Tensor, ...],
    rows: Tensor | None,
    options: Options,
) -> tuple[LinearCall, KDCall]:
    """Check and flatten the arguments; those of ``linear_kd_loss``.

    Returns:
        The call, and the call of ``kd_loss`` that it stands for, whose logits are a placeholder without memory.

    Raises:
        ShapeError: If a shape does not fit, or a number or a name is out of range.
        TypeError: If a type, a dtype or a device does not fit, or the teacher requires a gradient.
    """
    student, dtype = _check_student(hidden, weight, options)
    lead = hidden.shape[:-1]
    hidden = flat_matrix("hidden", hidden)
    logits = hidden.new_empty((1, 1), dtype=dtype).expand(hidden.shape[0], weight.shape[0])
    teacher_hidden, teacher_layer = None, None
    if isinstance(teacher, LinearTeacher) or _is_pair(teacher):
        teacher_hidden, teacher_layer = _check_linear_teacher(LinearTeacher(*teacher), rows, lead, weight)
        m = teacher_hidden.shape[0]
        teacher = hidden.new_empty((1, 1), dtype=teacher_hidden.dtype).expand(m, weight.shape[0])
    elif not isinstance(teacher, Tensor) and not (isinstance(teacher, tuple) and len(teacher) == 3):
        raise TypeError(
            f"`teacher` is {type(teacher).__name__}: pass logits (M, V), a TopKTeacher, a LinearTeacher, or a tuple "
            "(hidden, weight) or (hidden, weight, bias)"
        )
    teacher = flat_teacher(teacher, rows, lead)  # type: ignore[arg-type]
    kind = options["teacher_kind"]
    check_kind(kind, isinstance(teacher, Tensor) and teacher_hidden is None)
    vectors = {
        name: flat_vector(name, x, lead)
        for name, x in [("rows", rows), *((name, options[name]) for name in ("weights", "alpha", "temperature"))]
        if isinstance(x, Tensor)
    }
    kd = _make_kd_call(logits, flat_labels(labels, lead), teacher, vectors.get("rows", rows), vectors, options)
    kd = kd.replace(weights=_factors(kd, options["num_items"]), reduction="none" if kd.reduction == "none" else "sum")
    if options["class_weights"] is not None:
        kd = with_class_weights(kd, options["class_weights"])
    values = kd.teacher if teacher_hidden is None else teacher_hidden
    head = Layer(values, None, 0.0, 1.0) if teacher_layer is None else teacher_layer
    call = LinearCall(
        hidden, weight, student.bias, kd.labels, values, kd.rows, kd.classes, kd.tail, kd.weights, kd.alphas,  # type: ignore[arg-type]
        kd.temperatures, None if teacher_layer is None else head.weight, head.bias, kd.alpha, kd.temperature,
        kd.t_squared, kd.ignore_index, kd.reduction, kd.reverse, kd.divergence, kd.first_weight, kd.second_weight,
        kd.label_smoothing, student.softcap, student.scale, head.softcap, head.scale, kind == "probs",
        _chunk(options["chunk"]), dtype,
    )  # fmt: skip
    return call, kd


def _make_kd_call(
    logits: Tensor, labels: Any, teacher: Any, rows: Any, vectors: dict[str, Tensor], options: Options
) -> KDCall:
    divergence = options["divergence"]
    if divergence not in ("forward", "reverse", "jsd"):
        raise ShapeError(f"`divergence` is {divergence!r}: pass 'forward', 'reverse' or 'jsd'")
    if options["memory"] not in ("fast", "low"):
        raise ShapeError(f"`memory` is {options['memory']!r}: pass 'fast' or 'low'")
    weights = vectors.get("weights", options["weights"])
    if isinstance(weights, Tensor) and weights.requires_grad:
        raise TypeError(
            "`weights` require a gradient, which linear_kd_loss does not compute: pass weights.detach(), or multiply "
            "the losses of reduction='none'"
        )
    beta = as_float("beta", options["beta"])
    if divergence == "jsd" and not 0 < beta < 1:
        limits = "for 0 pass divergence='forward', for 1 'reverse'"
        raise ShapeError(f"`beta` is {beta}: must be above 0 and below 1, the teacher's share of the mixture; {limits}")
    if divergence == "jsd" and not isinstance(teacher, Tensor):
        raise ShapeError(
            "`teacher` is a TopKTeacher, and the divergence 'jsd' needs all classes: pass logits (M, V) or a "
            "LinearTeacher, or divergence='forward'"
        )
    return make_call(
        logits, labels, teacher, rows, weights,
        alpha=vectors.get("alpha", options["alpha"]), temperature=vectors.get("temperature", options["temperature"]),
        t_squared=options["t_squared"], ignore_index=options["ignore_index"], reduction=options["reduction"],
        direction="reverse" if divergence == "reverse" else "forward",
        divergence="jsd" if divergence == "jsd" else "kl",
        jsd_beta=beta, dkd_weights=(1.0, 1.0), label_smoothing=options["label_smoothing"],
        class_weights=options["class_weights"],
    )  # fmt: skip


def _check_student(hidden: Tensor, weight: Tensor, options: Options) -> tuple[Layer, torch.dtype]:
    """Check hidden states and last layer; return the layer and the dtype of its logits."""
    check_tensor("hidden", hidden, None)
    if hidden.dim() < 2:
        raise ShapeError(f"`hidden` has shape {tuple(hidden.shape)}: must be (tokens, H), or (..., H)")
    layer = _check_layer("", hidden, weight, options["bias"], options["softcap"], options["logit_scale"])
    device = hidden.device.type
    has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if has_autocast and hidden.dtype != torch.float64:
        return layer, torch.get_autocast_dtype(device)
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"`hidden` is {hidden.dtype} and `weight` is {weight.dtype}: pass the same dtype, or use torch.autocast"
        )
    return layer, hidden.dtype


def _check_layer(prefix: str, hidden: Tensor, weight: Any, bias: Any, softcap: Any, scale: Any) -> Layer:
    """Check weights, bias and numbers of a last layer against its hidden states."""
    weight_name, bias_name, of = f"`{prefix}weight`", f"`{prefix}bias`", f"`{prefix}hidden`"
    check_tensor(f"{prefix}weight", weight, 2)
    for name, x in ((of, hidden), (weight_name, weight)):
        if x.dtype not in _FLOATS:
            raise TypeError(f"{name} is {x.dtype}: must be float32, bfloat16, float16 or float64")
    if weight.device != hidden.device:
        raise TypeError(f"{weight_name} is on {weight.device} and {of} on {hidden.device}: move one of them")
    v, h = weight.shape
    if h != hidden.shape[-1]:
        raise ShapeError(f"{weight_name} has shape {(v, h)}: must be (V, {hidden.shape[-1]}), as wide as {of}")
    if v == 0:
        raise ShapeError(f"{weight_name} has shape {(v, h)}: pass at least one class")
    if bias is not None:
        check_tensor(f"{prefix}bias", bias, 1)
        if bias.shape[0] != v:
            raise ShapeError(
                f"{bias_name} has shape {tuple(bias.shape)}: must be ({v},), like the rows of {weight_name}"
            )
        if bias.device != weight.device or bias.dtype != weight.dtype:
            raise TypeError(
                f"{bias_name} is {bias.dtype} on {bias.device}: must be {weight.dtype} on {weight.device}, like "
                f"{weight_name}"
            )
    cap = 0.0 if softcap is None else as_float(f"{prefix}softcap", softcap)
    if softcap is not None and not 0 < cap < math.inf:
        raise ShapeError(f"`{prefix}softcap` is {cap}: must be positive and finite, or None for no bound")
    scale = as_float(f"{prefix}logit_scale", scale)
    if not 0 < scale < math.inf:
        raise ShapeError(f"`{prefix}logit_scale` is {scale}: must be positive and finite")
    return Layer(weight, bias, float(cap), float(scale))


def _is_pair(teacher: Any) -> bool:
    """Whether a teacher is a plain tuple of hidden states, weights and perhaps bias, and no ``TopKTeacher``."""
    if not isinstance(teacher, tuple) or isinstance(teacher, TopKTeacher):
        return False
    return len(teacher) == 2 or (
        len(teacher) == 3 and isinstance(teacher[1], Tensor) and teacher[1].is_floating_point()
    )


def _check_linear_teacher(
    teacher: LinearTeacher, rows: Tensor | None, lead: torch.Size, weight: Tensor
) -> tuple[Tensor, Layer]:
    hidden, of_teacher, bias, softcap, scale = teacher
    check_tensor("teacher.hidden", hidden, None)
    if hidden.dim() < 2:
        raise ShapeError(f"`teacher.hidden` has shape {tuple(hidden.shape)}: must be (rows, K), or (..., K)")
    layer = _check_layer("teacher.", hidden, of_teacher, bias, softcap, scale)
    for name, x in (("hidden", hidden), ("weight", of_teacher), ("bias", bias)):
        if x is not None and x.requires_grad:
            raise TypeError(
                f"`teacher.{name}` requires a gradient, which linear_kd_loss does not compute: pass {name}.detach()"
            )
    if hidden.device != weight.device:
        raise TypeError(f"`teacher.hidden` is on {hidden.device} and `weight` on {weight.device}: move one of them")
    if of_teacher.shape[0] != weight.shape[0]:
        raise ShapeError(
            f"`teacher.weight` has {of_teacher.shape[0]} classes and `weight` has {weight.shape[0]}: "
            "both need the same classes in the same order"
        )
    return flat_matrix("teacher.hidden", hidden, lead if rows is None else None), layer


def _factors(call: KDCall, num_items: Any) -> Tensor:
    """The factor of each row: its weight, over the number or the weight of the rows of a mean."""
    dtype = torch.promote_types(call.logits.dtype, torch.float32)
    n = call.logits.shape[0]
    weights = call.logits.new_ones((n,), dtype=dtype) if call.weights is None else call.weights.to(dtype)
    if num_items is not None:
        if call.reduction != "mean":
            raise ShapeError(f"`num_items` is the divisor of a mean, and `reduction` is {call.reduction!r}: omit one")
        divided: Tensor = weights / _count(num_items, call.logits.device)
        return divided
    if call.reduction != "mean":
        return weights
    counted = weights if call.hard_labels is None else torch.where(call.hard_labels != call.ignore_index, weights, 0)
    return weights * safe_reciprocal(counted.sum())


def _count(num_items: Any, device: torch.device) -> Any:
    """Return the divisor; a tensor is not read, unless it is on a CPU."""
    if isinstance(num_items, Tensor) and num_items.device.type != "cpu":
        if num_items.numel() != 1:
            raise ShapeError(f"`num_items` has shape {tuple(num_items.shape)}: pass a number or a scalar tensor")
        return num_items.reshape(()).to(device)
    number = as_float("num_items", num_items)
    if not 0 < number < math.inf:
        raise ShapeError(f"`num_items` is {number}: must be positive, the number of tokens that the loss is divided by")
    return number


def _chunk(chunk: Any) -> int:
    if chunk == "auto":
        return 0
    size = as_int("chunk", chunk)
    if size < 1:
        raise ShapeError(f"`chunk` is {size}: pass 'auto', or the number of rows whose logits are held at a time")
    return size
