"""What ``kd_loss`` accepts, checked without reading a tensor's values unless asked to."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kdfast.errors import KdfastError, ShapeError
from kdfast.ops.kd_loss.dispatch import Operands, Options

__all__ = ["TopKTeacher", "check_call", "check_teacher_logits", "check_temperature", "check_values", "number", "whole"]

_LEAST_T, _MOST_T = 1e-15, 1e15
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TopKTeacher(NamedTuple):
    """A teacher's k most probable classes for each of M rows.

    Attributes:
        values: (M, k) raw logits of those classes, floating point.
        classes: (M, k) int32 class ids, distinct within a row, in any order.
        tail: (M,) natural logarithm of the sum of exp(t / T) over the classes left out, at the temperature T of the
            loss; -inf when none is left out.
    """

    values: Tensor
    classes: Tensor
    tail: Tensor


def number(name: str, value: object) -> float:
    """A Python number, also from one of NumPy or a scalar tensor on the CPU.

    Raises:
        TypeError: If it is neither, or would get a gradient.
    """
    if isinstance(value, (float, int, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, Tensor):
        if value.dtype == torch.bool or value.is_complex():
            raise TypeError(f"{name} is a tensor of {value.dtype}: give a number")
        if value.numel() != 1 or value.device.type != "cpu" or value.requires_grad:
            grad = " that requires a gradient" if value.requires_grad else ""
            raise TypeError(
                f"{name} is a tensor of shape {tuple(value.shape)} on {value.device}{grad}: "
                "give a number, or a scalar CPU tensor without a gradient"
            )
        return float(value.item())
    if isinstance(value, (np.floating, np.integer)):
        return float(value)
    raise TypeError(f"{name} is {value!r}: give a number")


def whole(name: str, value: object) -> int:
    """A whole Python number, also from one of NumPy.

    Raises:
        TypeError: If it is neither.
    """
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # type: ignore[return-value]
    if isinstance(value, np.integer):
        return int(value)
    raise TypeError(f"{name} is {value!r}: a whole number is needed")


def check_call(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor | TopKTeacher,
    rows: Tensor | None,
    weights: Tensor | None,
    options: Options,
    direction: str,
) -> Operands:
    """Check shapes, dtypes, devices and numbers, and take a ``TopKTeacher`` apart.

    Raises:
        ShapeError: If a shape does not fit, or a number or a name lies outside its range.
        TypeError: If a dtype or a device does not fit, or the teacher requires a gradient.
    """
    _check_options(options, direction)
    _check_tensor("logits", logits, 2)
    n, c = logits.shape
    device = logits.device
    if logits.dtype not in _FLOATS:
        raise TypeError(f"logits are {logits.dtype}: float32, bfloat16, float16 or float64 is needed")
    if c == 0 and n > 0:
        raise ShapeError(f"logits have shape {(n, c)}: at least one class is needed")
    if labels is not None:
        _check_index("labels", labels, n, device)
    elif options.alpha != 1:
        raise ShapeError(f"labels are None, but alpha is {options.alpha}: give labels, or alpha=1 to leave them out")
    if rows is not None:
        _check_index("rows", rows, n, device)
    if weights is not None:
        _check_tensor("weights", weights, 1)
        if weights.shape[0] != n:
            raise ShapeError(f"weights have shape {tuple(weights.shape)}: ({n},) is needed, one for each row of logits")
        if weights.dtype not in _FLOATS:
            raise TypeError(f"weights are {weights.dtype}: a floating dtype is needed")
        _check_device("weights", weights, device)
    if isinstance(teacher, Tensor):
        _check_teacher("teacher", teacher, n, rows, device)
        if teacher.shape[1] != c:
            raise ShapeError(
                f"teacher has {teacher.shape[1]} classes and logits have {c}: the same ones are needed, in one order"
            )
        return Operands(logits, labels, teacher, rows, None, None, weights)
    values, classes, tail = _check_topk(teacher, n, c, rows, device)
    return Operands(logits, labels, values, rows, classes, tail, weights)


def check_temperature(temperature: float, *, name: str = "temperature", error: type[KdfastError] = ShapeError) -> None:
    """Check that neither 1 / T nor T^2 leaves float32.

    Args:
        temperature: T.
        name: What it is called in the message.
        error: The kind of error to raise, for callers whose number is an option of a command.

    Raises:
        KdfastError: Of kind `error`: one does.
    """
    if not _LEAST_T <= temperature <= _MOST_T:
        raise error(f"{name} is {temperature}: a positive number is needed, from {_LEAST_T} to {_MOST_T}")


def check_teacher_logits(name: str, x: Tensor) -> None:
    """Check that these are logits (M, C), in a floating dtype.

    Raises:
        ShapeError: If the shape is another.
        TypeError: If it is no tensor, or the dtype is another.
    """
    _check_tensor(name, x, 2)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name} is {x.dtype}: raw logits in float32, bfloat16, float16 or float64 are needed")


def check_values(operands: Operands, options: Options, thorough: bool) -> None:
    """Check that labels, rows and class ids lie in their ranges; reads them, so on a GPU it waits.

    ``thorough`` also checks that the class ids of a top-k teacher are distinct within each row.

    Raises:
        IndexError: If one does not.
        ShapeError: If class ids repeat within a row.
    """
    n, c = operands.logits.shape
    counted = torch.ones(n, dtype=torch.bool, device=operands.logits.device)
    if operands.labels is not None:
        counted = operands.labels != options.ignore_index
        _check_range("labels", operands.labels, counted, c, f"or ignore_index ({options.ignore_index})")
    if operands.rows is not None:
        _check_range("rows", operands.rows, counted, operands.teacher.shape[0], "the teacher's rows")
    if operands.classes is not None and (options.alpha > 0 or thorough):
        ids = operands.classes
        picked = counted if operands.rows is None else counted.new_zeros(ids.shape[0])
        if thorough:
            picked = torch.ones_like(picked)
        elif operands.rows is not None:
            picked[operands.rows[counted]] = True
        _check_range("teacher.classes", ids, picked.unsqueeze(1), c, "the classes of logits")
        if thorough:
            ordered = ids.sort(1).values
            if bool((ordered[:, 1:] == ordered[:, :-1]).any()):
                raise ShapeError("teacher.classes repeat a class within a row: give each class once")


def _check_options(options: Options, direction: str) -> None:
    if not 0 <= options.alpha <= 1:
        raise ShapeError(f"alpha is {options.alpha}: it must lie in [0, 1], the share of the divergence in the loss")
    check_temperature(options.temperature)
    if not isinstance(options.t_squared, bool):
        raise TypeError(f"t_squared is {options.t_squared!r}: True or False is needed")
    if isinstance(options.ignore_index, int) and not -(2**63) <= options.ignore_index < 2**63:
        raise ShapeError(f"ignore_index is {options.ignore_index}: no int64 label can be that")
    if options.reduction not in ("mean", "sum", "none"):
        raise ShapeError(f"reduction is {options.reduction!r}: 'mean', 'sum' or 'none' is needed")
    if direction not in ("forward", "reverse"):
        raise ShapeError(f"direction is {direction!r}: 'forward' or 'reverse' is needed")


def _check_tensor(name: str, x: object, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is {type(x).__name__}: a tensor is needed")
    if x.is_nested:
        raise TypeError(f"{name} is a nested tensor: a rectangular one is needed; pad it, and mark rows to ignore")
    if x.layout != torch.strided:
        raise TypeError(f"{name} is a {x.layout} tensor: a dense one is needed; convert it with .to_dense()")
    if x.dim() != dim:
        needed = "(rows, classes)" if dim == 2 else "one dimension"
        raise ShapeError(f"{name} has shape {tuple(x.shape)}: {needed} is needed; flatten leading dimensions first")


def _check_device(name: str, x: Tensor, device: torch.device) -> None:
    if x.device != device:
        raise TypeError(f"{name} is on {x.device} and logits are on {device}: move it with .to({str(device)!r})")


def _check_index(name: str, x: Tensor, n: int, device: torch.device) -> None:
    _check_tensor(name, x, 1)
    if x.shape[0] != n:
        raise ShapeError(f"{name} has shape {tuple(x.shape)}: ({n},) is needed, one for each row of logits")
    if x.dtype != torch.int64:
        raise TypeError(f"{name} is {x.dtype}: int64 is needed; convert it with .long()")
    _check_device(name, x, device)


def _check_teacher(name: str, x: Tensor, n: int, rows: Tensor | None, device: torch.device) -> None:
    check_teacher_logits(name, x)
    if x.requires_grad:
        raise TypeError(f"{name} requires a gradient, which kd_loss does not compute: pass {name}.detach()")
    _check_device(name, x, device)
    if rows is not None and n > 0 and x.shape[0] == 0:
        raise IndexError(f"{name} has no rows, so no row lies in [0, 0), the teacher's rows: give it some")
    if rows is None and x.shape[0] != n:
        raise ShapeError(
            f"{name} has {x.shape[0]} rows and logits have {n}: give rows, the teacher's row of each sample"
        )


def _check_topk(teacher: object, n: int, c: int, rows: Tensor | None, device: torch.device) -> TopKTeacher:
    if not isinstance(teacher, tuple) or len(teacher) != 3:
        raise TypeError(f"teacher is {type(teacher).__name__}: a tensor of logits (M, C) or a TopKTeacher is needed")
    values, classes, tail = teacher
    _check_teacher("teacher.values", values, n, rows, device)
    _check_tensor("teacher.classes", classes, 2)
    _check_tensor("teacher.tail", tail, 1)
    if classes.shape != values.shape or tail.shape != values.shape[:1]:
        raise ShapeError(
            f"teacher.values, classes and tail have shapes {tuple(values.shape)}, {tuple(classes.shape)} and "
            f"{tuple(tail.shape)}: (M, k), (M, k) and (M,) are needed"
        )
    if not 1 <= values.shape[1] <= c:
        raise ShapeError(f"teacher.values hold {values.shape[1]} classes a row: 1 to {c} are needed, as logits have")
    if classes.dtype != torch.int32:
        raise TypeError(f"teacher.classes is {classes.dtype}: int32 is needed; convert it with .int()")
    if tail.dtype not in _FLOATS:
        raise TypeError(f"teacher.tail is {tail.dtype}: a floating dtype is needed")
    if tail.requires_grad:
        raise TypeError("teacher.tail requires a gradient, which kd_loss does not compute: pass teacher.tail.detach()")
    _check_device("teacher.classes", classes, device)
    _check_device("teacher.tail", tail, device)
    return TopKTeacher(values, classes, tail)


def _check_range(name: str, x: Tensor, counted: Tensor, size: int, owner: str) -> None:
    bad = ((x < 0) | (x >= size)) & counted
    if bool(bad.any()):
        at = tuple(int(i) for i in bad.nonzero()[0])
        place = ", ".join(str(i) for i in at)
        raise IndexError(f"{name}[{place}] is {int(x[at])}: it must lie in [0, {size}), {owner}")
