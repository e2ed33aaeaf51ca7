"""Check the arguments of ``kd_loss`` and build a ``KDCall``; no values of tensors are read."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from kdfast.errors import KdfastError, ShapeError
from kdfast.ops.kd_loss.call import ALPHA_RANGE, MAX_T, MIN_T, T_RANGE, KDCall, TopKTeacher

__all__ = ["as_float", "as_int", "check_teacher_logits", "check_temperature", "check_tensor", "make_call"]

DIVERGENCES = ("kl", "jsd", "dkd", "standardized")

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make_call(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor | TopKTeacher,
    rows: Tensor | None,
    weights: Tensor | None,
    *,
    alpha: object,
    temperature: object,
    t_squared: bool,
    ignore_index: object,
    reduction: str,
    direction: str,
    divergence: str,
    jsd_beta: object,
    dkd_weights: object,
    label_smoothing: object = 0.0,
    class_weights: Tensor | None = None,
) -> KDCall:
    """Check shapes, dtypes, devices and numbers, and unpack a ``TopKTeacher``; arguments as in ``kd_loss``.

    Raises:
        ShapeError: If a shape does not fit, or a number or a name is out of range.
        TypeError: If a type, a dtype or a device does not fit, or the teacher requires a gradient.
    """
    _check_logits(logits)
    alpha, alphas = _number_or_vector("alpha", alpha, logits, 0.5)
    temperature, temperatures = _number_or_vector("temperature", temperature, logits, 1.0)
    ignore_index, smoothing = as_int("ignore_index", ignore_index), as_float("label_smoothing", label_smoothing)
    _check_options(alpha, temperature, t_squared, ignore_index, reduction, direction, smoothing)
    first, second = _part_weights(divergence, direction, jsd_beta, dkd_weights)
    if labels is not None and isinstance(labels, Tensor) and labels.is_floating_point():
        _check_soft_labels(labels, logits, divergence)
    elif labels is not None:
        _check_index("labels", labels, logits)
    elif alphas is not None or alpha != 1:
        value = alpha if alphas is None else "a tensor"
        raise ShapeError(f"`labels` are None, but `alpha` is {value}: pass `labels`, or alpha=1 to train without them")
    elif divergence == "dkd":
        raise ShapeError("`labels` are None, but the divergence 'dkd' depends on them: pass `labels`")
    if rows is not None:
        _check_index("rows", rows, logits)
    if weights is not None:
        _check_vector("weights", weights, logits)
    if class_weights is not None:
        _check_class_weights(class_weights, logits, smoothing)
    if isinstance(teacher, Tensor):
        _check_dense_teacher(teacher, rows, logits)
        values, classes, tail = teacher, None, None
    else:
        values, classes, tail = _check_topk_teacher(teacher, rows, logits)
        if divergence != "kl":
            raise ShapeError(
                f"`teacher` is a TopKTeacher, and the divergence {divergence!r} needs the logits of all classes: "
                "pass (M, C) logits, or divergence='kl'"
            )
    numbers = (alpha, temperature, t_squared, ignore_index, reduction, direction == "reverse")
    tensors = (logits, labels, values, rows, classes, tail, weights, alphas, temperatures)
    return KDCall(*tensors, *numbers, divergence, first, second, smoothing)


def as_float(name: str, value: object) -> float:
    """Return a Python number; NumPy numbers and scalar CPU tensors are converted.

    Raises:
        TypeError: If it is not one of these, or requires a gradient.
    """
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"`{name}` is a tensor of {value.dtype}: pass a number")
        if value.numel() != 1 or value.device.type != "cpu" or value.requires_grad:
            grad = " that requires a gradient" if value.requires_grad else ""
            raise TypeError(
                f"`{name}` is a tensor of shape {tuple(value.shape)} on {value.device}{grad}: "
                "pass a number, or a scalar CPU tensor without a gradient"
            )
        return float(value.item())
    if isinstance(value, (np.floating, np.integer)):
        return float(value)
    raise TypeError(f"`{name}` is {value!r}: pass a number")


def _number_or_vector(name: str, value: object, logits: Tensor, default: float) -> tuple[float, Tensor | None]:
    """Return a number, or, if the value is a tensor with one number per row of the logits, a default and the tensor."""
    n = logits.shape[0]
    if isinstance(value, (list, tuple, np.ndarray)):
        raise TypeError(
            f"`{name}` is of type {type(value).__name__}: pass a number, or a tensor ({n},), one for each row of "
            "`logits`"
        )
    if not isinstance(value, Tensor) or value.dim() == 0:
        return as_float(name, value), None
    if value.numel() == 1 and (n != 1 or value.dim() != 1 or not value.is_floating_point()):
        return as_float(name, value), None
    if value.dim() != 1 or value.shape[0] != n:
        raise ShapeError(
            f"`{name}` has shape {tuple(value.shape)}: pass a number, or a tensor ({n},), one for each row of `logits`"
        )
    _check_vector(name, value, logits)
    if value.requires_grad:
        raise TypeError(f"`{name}` requires a gradient, which kd_loss does not compute: pass {name}.detach()")
    return default, value


def as_int(name: str, value: object) -> int:
    """Return a Python integer; NumPy integers are converted.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, np.integer):
        return int(value)
    raise TypeError(f"`{name}` is {value!r}: pass an integer")


def check_temperature(
    temperature: float, *, name: str = "`temperature`", error: type[KdfastError] = ShapeError
) -> None:
    """Check that 1 / T and T^2 are representable in float32.

    Args:
        temperature: T.
        name: The name to use in the message.
        error: The class of the error to raise.

    Raises:
        KdfastError: Of class `error`, if T is out of range.
    """
    if not MIN_T <= temperature <= MAX_T:
        raise error(f"{name} is {temperature}: {T_RANGE}")


def check_teacher_logits(name: str, x: Tensor) -> None:
    """Check that a tensor holds logits: (M, C), floating point.

    Raises:
        ShapeError: If it is not two-dimensional.
        TypeError: If it is not a tensor, or its dtype is not floating point.
    """
    check_tensor(name, x, 2)
    if x.dtype not in _FLOATS:
        raise TypeError(f"`{name}` is {x.dtype}: pass raw logits in float32, bfloat16, float16 or float64")


def _check_options(
    alpha: float,
    temperature: float,
    t_squared: bool,
    ignore_index: int,
    reduction: str,
    direction: str,
    smoothing: float,
) -> None:
    if not 0 <= alpha <= 1:
        raise ShapeError(f"`alpha` is {alpha}: {ALPHA_RANGE}")
    check_temperature(temperature)
    if not isinstance(t_squared, bool):
        raise TypeError(f"`t_squared` is {t_squared!r}: pass True or False")
    if isinstance(ignore_index, int) and not -(2**63) <= ignore_index < 2**63:
        raise ShapeError(f"`ignore_index` is {ignore_index}: must fit into int64, like `labels`")
    if reduction not in ("mean", "sum", "none"):
        raise ShapeError(f"`reduction` is {reduction!r}: pass 'mean', 'sum' or 'none'")
    if direction not in ("forward", "reverse"):
        raise ShapeError(f"`direction` is {direction!r}: pass 'forward' or 'reverse'")
    if not 0 <= smoothing < 1:
        raise ShapeError(f"`label_smoothing` is {smoothing}: must be at least 0 and below 1")


def _part_weights(divergence: str, direction: str, jsd_beta: object, dkd_weights: object) -> tuple[float, float]:
    """Check the divergence, and return the weights of its two parts; zeros if it has one part."""
    if divergence not in DIVERGENCES:
        names = ", ".join(repr(name) for name in DIVERGENCES)
        raise ShapeError(f"`divergence` is {divergence!r}: pass one of {names}")
    if divergence != "kl" and direction != "forward":
        raise ShapeError(f"`direction` is {direction!r}, and the divergence {divergence!r} has none: omit it")
    if divergence == "jsd":
        beta = as_float("jsd_beta", jsd_beta)
        if not 0 < beta < 1:
            raise ShapeError(f"`jsd_beta` is {beta}: must be above 0 and below 1, the teacher's share of the mixture")
        return beta, 1 - beta
    if divergence == "dkd":
        if not isinstance(dkd_weights, (tuple, list)) or len(dkd_weights) != 2:
            raise TypeError(f"`dkd_weights` is {dkd_weights!r}: pass two numbers")
        first, second = (as_float(f"dkd_weights[{i}]", weight) for i, weight in enumerate(dkd_weights))
        if not (0 <= first < math.inf and 0 <= second < math.inf):
            raise ShapeError(f"`dkd_weights` are {(first, second)}: must be finite and not negative")
        return first, second
    return 0.0, 0.0


def _check_logits(logits: Tensor) -> None:
    check_tensor("logits", logits, 2)
    if logits.dtype not in _FLOATS:
        raise TypeError(f"`logits` are {logits.dtype}: must be float32, bfloat16, float16 or float64")
    n, c = logits.shape
    if c == 0 and n > 0:
        raise ShapeError(f"`logits` have shape {(n, c)}: pass at least one class")


def _check_vector(name: str, x: Tensor, logits: Tensor) -> None:
    check_tensor(name, x, 1)
    n = logits.shape[0]
    if x.shape[0] != n:
        raise ShapeError(f"`{name}` has shape {tuple(x.shape)}: must be ({n},), one for each row of `logits`")
    if x.dtype not in _FLOATS:
        raise TypeError(f"`{name}` is {x.dtype}: must have a floating dtype")
    _check_device(name, x, logits)


def check_tensor(name: str, x: object, dim: int | None) -> None:
    """Check that an argument is a dense tensor with a number of dimensions, or with any number if that is None.

    Raises:
        ShapeError: If it has another number of dimensions.
        TypeError: If it is no tensor, or not a plain dense one.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"`{name}` is {type(x).__name__}: pass a tensor")
    if x.is_nested:
        raise TypeError(f"`{name}` is a nested tensor: must be rectangular; pad it, and mark rows to ignore")
    if type(x).__name__ == "DTensor":
        raise TypeError(
            f"`{name}` is a DTensor, split over processes: pass `{name}`.full_tensor(), or the rows of this process by "
            ".to_local() if the split is along the rows"
        )
    if x.layout != torch.strided:
        raise TypeError(f"`{name}` is a {x.layout} tensor: must be dense; convert it with .to_dense()")
    if dim is not None and x.dim() != dim:
        needed = "(rows, classes)" if dim == 2 else "one dimension"
        advice = "flatten leading dimensions first"
        if name == "labels" and x.dim() == 2 and not x.is_floating_point():
            advice = "pass probabilities as floating-point numbers"
        raise ShapeError(f"`{name}` has shape {tuple(x.shape)}: must have {needed}; {advice}")


def _check_device(name: str, x: Tensor, logits: Tensor) -> None:
    if x.device != logits.device:
        move = f"move it with .to({str(logits.device)!r})"
        raise TypeError(f"`{name}` is on {x.device} and `logits` are on {logits.device}: {move}")


def _check_index(name: str, x: Tensor, logits: Tensor) -> None:
    check_tensor(name, x, 1)
    n = logits.shape[0]
    if x.shape[0] != n:
        raise ShapeError(f"`{name}` has shape {tuple(x.shape)}: must be ({n},), one for each row of `logits`")
    if x.dtype != torch.int64:
        raise TypeError(f"`{name}` is {x.dtype}: must be int64; convert it with .long()")
    _check_device(name, x, logits)


def _check_soft_labels(labels: Tensor, logits: Tensor, divergence: str) -> None:
    check_tensor("labels", labels, 2)
    if labels.shape != logits.shape:
        raise ShapeError(
            f"`labels` are probabilities of shape {tuple(labels.shape)}: must be {tuple(logits.shape)}, like `logits`; "
            "classes are integers (N,), of dtype int64"
        )
    if labels.dtype not in _FLOATS:
        raise TypeError(f"`labels` are {labels.dtype}: pass probabilities in float32, bfloat16, float16 or float64")
    if labels.requires_grad:
        raise TypeError("`labels` require a gradient, which kd_loss does not compute: pass labels.detach()")
    if divergence == "dkd":
        raise ShapeError("`labels` are probabilities, but the divergence 'dkd' needs one class per row: pass classes")
    _check_device("labels", labels, logits)


def _check_class_weights(weights: Tensor, logits: Tensor, smoothing: float) -> None:
    check_tensor("class_weights", weights, 1)
    c = logits.shape[1]
    if weights.shape[0] != c:
        raise ShapeError(f"`class_weights` has shape {tuple(weights.shape)}: must be ({c},), one for each class")
    if weights.dtype not in _FLOATS:
        raise TypeError(f"`class_weights` is {weights.dtype}: must have a floating dtype")
    if weights.requires_grad:
        raise TypeError(
            "`class_weights` require a gradient, which kd_loss does not compute: pass class_weights.detach()"
        )
    if smoothing > 0:
        raise ShapeError(f"`label_smoothing` is {smoothing}, which does not go with `class_weights`: omit one of them")
    _check_device("class_weights", weights, logits)


def _check_teacher(name: str, x: Tensor, rows: Tensor | None, logits: Tensor) -> None:
    check_teacher_logits(name, x)
    if x.requires_grad:
        raise TypeError(f"`{name}` requires a gradient, which kd_loss does not compute: pass {name}.detach()")
    _check_device(name, x, logits)
    n = logits.shape[0]
    if rows is not None and n > 0 and x.shape[0] == 0:
        raise IndexError(f"`{name}` has no rows: pass at least one")
    if rows is None and x.shape[0] != n:
        raise ShapeError(
            f"`{name}` has {x.shape[0]} rows and `logits` have {n}: pass `rows`, the teacher's row of each sample"
        )


def _check_dense_teacher(teacher: Tensor, rows: Tensor | None, logits: Tensor) -> None:
    _check_teacher("teacher", teacher, rows, logits)
    if teacher.shape[1] != logits.shape[1]:
        raise ShapeError(
            f"`teacher` has {teacher.shape[1]} classes and `logits` have {logits.shape[1]}: "
            "both need the same classes in the same order"
        )


def _check_topk_teacher(teacher: object, rows: Tensor | None, logits: Tensor) -> TopKTeacher:
    if not isinstance(teacher, tuple) or len(teacher) != 3:
        raise TypeError(f"`teacher` is {type(teacher).__name__}: pass a tensor of logits (M, C) or a TopKTeacher")
    values, classes, tail = teacher
    _check_teacher("teacher.values", values, rows, logits)
    check_tensor("teacher.classes", classes, 2)
    check_tensor("teacher.tail", tail, 1)
    if classes.shape != values.shape or tail.shape != values.shape[:1]:
        raise ShapeError(
            f"`teacher.values`, `teacher.classes` and `teacher.tail` have shapes {tuple(values.shape)}, "
            f"{tuple(classes.shape)} and {tuple(tail.shape)}: must be (M, k), (M, k) and (M,)"
        )
    k, c = values.shape[1], logits.shape[1]
    if not 1 <= k <= c:
        raise ShapeError(
            f"`teacher.values` hold {k} classes per row: must be 1 to {c}, the number of classes in `logits`"
        )
    if classes.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"`teacher.classes` is {classes.dtype}: must be int32 or int64; convert it with .int()")
    if tail.dtype not in _FLOATS:
        raise TypeError(f"`teacher.tail` is {tail.dtype}: must have a floating dtype")
    if tail.requires_grad:
        raise TypeError(
            "`teacher.tail` requires a gradient, which kd_loss does not compute: pass teacher.tail.detach()"
        )
    _check_device("teacher.classes", classes, logits)
    _check_device("teacher.tail", tail, logits)
    if classes.dtype == torch.int64:
        classes = classes.clamp(-1, 2**31 - 1).int()  # an id that int32 cannot hold stays out of range
    return TopKTeacher(values, classes, tail)
