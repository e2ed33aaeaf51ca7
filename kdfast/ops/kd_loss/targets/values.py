"""Check the values of the tensors of a ``kd_loss`` call: labels, rows, class ids, and alpha and temperature."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.kd_loss.call import ALPHA_RANGE, MAX_T, MIN_T, T_RANGE, KDCall

__all__ = ["check_class_weights", "check_probabilities", "check_values"]

_BLOCK = 1 << 20
"""Entries that are checked at a time."""


def check_values(call: KDCall, thorough: bool, *, has_probs: bool = False) -> None:
    """Check labels, rows, class ids, and alpha and temperature of each sample. On a GPU, this synchronizes.

    Args:
        call: The call to check.
        thorough: Check the class ids of every row of a top-k teacher, not only of those that are used.
        has_probs: Whether the teacher holds probabilities; they are checked in the rows that are used.

    Raises:
        IndexError: If a label, a row or a class id is out of range.
        ShapeError: If a probability is negative or not finite, a class id repeats within a row, or alpha or a
            temperature is out of range.
    """
    n, c = call.logits.shape
    counted = torch.ones(n, dtype=torch.bool, device=call.logits.device)
    if call.hard_labels is not None:
        counted = call.hard_labels != call.ignore_index
        _check_range("labels", call.hard_labels, counted, c, f"or `ignore_index` ({call.ignore_index})")
    elif call.soft_labels is not None:
        check_probabilities("labels", call.soft_labels)
    if call.rows is not None:
        _check_range("rows", call.rows, counted, call.teacher.shape[0], "the rows of `teacher`")
    if has_probs:
        check_probabilities("teacher", call.teacher, None if call.rows is None else call.rows[counted])
    if call.alphas is not None:
        _check_numbers("alpha", call.alphas, counted, 0, 1, ALPHA_RANGE)
    if call.temperatures is not None:
        _check_numbers("temperature", call.temperatures, counted, MIN_T, MAX_T, T_RANGE)
    if call.classes is None or not (call.use_kl or thorough):
        return
    if call.alphas is not None:
        counted = counted & (call.alphas > 0)
    used = counted if call.rows is None else counted.new_zeros(call.classes.shape[0])
    if thorough:
        used = torch.ones_like(used)
    elif call.rows is not None:
        used[call.rows[counted]] = True
    _check_range("teacher.classes", call.classes, used.unsqueeze(1), c, "the classes of `logits`")
    _check_distinct(call.teacher, call.classes, used)


def check_probabilities(name: str, x: Tensor, rows: Tensor | None = None) -> None:
    """Check that no entry of a matrix, or of some of its rows, is negative, infinite or NaN.

    Raises:
        ShapeError: If one is.
    """
    rows = torch.arange(x.shape[0], device=x.device) if rows is None else rows
    # In blocks: the matrix may be larger than all that is computed from it.
    for block in torch.split(rows, max(1, _BLOCK // max(1, x.shape[1]))):
        part = x.index_select(0, block)
        bad = ~((part >= 0) & (part < torch.inf))
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            value = float(part[row, column])
            raise ShapeError(f"`{name}[{int(block[row])}, {column}]` is {value:g}: pass probabilities, not logits")


def check_class_weights(x: Tensor) -> None:
    """Check that no weight is negative, infinite or NaN.

    Raises:
        ShapeError: If one is.
    """
    bad = ~((x >= 0) & (x < torch.inf))
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ShapeError(f"`class_weights[{at}]` is {float(x[at]):g}: must be finite and not negative")


def _check_distinct(values: Tensor, classes: Tensor, used: Tensor) -> None:
    values, ids = values[used], classes[used]
    left_out = torch.arange(-1, -1 - ids.shape[1], -1, dtype=ids.dtype, device=ids.device)
    ordered = torch.where(torch.isneginf(values), left_out, ids).sort(1).values
    repeated = ordered[:, 1:] == ordered[:, :-1]
    if bool(repeated.any()):
        at = tuple(repeated.nonzero()[0])
        row = int(used.nonzero()[at[0]])
        raise ShapeError(
            f"`teacher.classes[{row}]` holds class {int(ordered[:, 1:][at])} twice: "
            "pass each class of a row once, and -inf as the value of entries to leave out"
        )


def _check_range(name: str, x: Tensor, counted: Tensor, size: int, valid: str) -> None:
    bad = ((x < 0) | (x >= size)) & counted
    if bool(bad.any()):
        position = tuple(int(i) for i in bad.nonzero()[0])
        index = ", ".join(str(i) for i in position)
        raise IndexError(f"`{name}[{index}]` is {int(x[position])}: must be in [0, {size}), {valid}")


def _check_numbers(name: str, x: Tensor, counted: Tensor, least: float, most: float, valid: str) -> None:
    bad = ~((x >= least) & (x <= most)) & counted
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        raise ShapeError(f"`{name}[{at}]` is {float(x[at]):g}: {valid}")
