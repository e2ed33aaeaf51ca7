"""Targets of ``kd_loss`` in other forms: teacher probabilities, soft labels, class weights, and leading dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.kd_loss.call import KDCall, TopKTeacher
from kdfast.ops.kd_loss.reference import safe_reciprocal

__all__ = [
    "TEACHER_KINDS",
    "check_kind",
    "flat_arguments",
    "flat_labels",
    "flat_matrix",
    "flat_teacher",
    "flat_vector",
    "log_probabilities",
    "pick_rows",
    "with_class_weights",
    "with_logits",
]

TEACHER_KINDS = ("logits", "logprobs", "probs")


def check_kind(kind: str, is_dense: bool) -> None:
    """Check ``teacher_kind``.

    Raises:
        ShapeError: If it is no kind, or the teacher has no probabilities of all classes.
    """
    if kind not in TEACHER_KINDS:
        raise ShapeError(f"`teacher_kind` is {kind!r}: pass 'logits', 'logprobs' or 'probs'")
    if kind == "probs" and not is_dense:
        raise ShapeError(
            "`teacher_kind` is 'probs', which needs a `teacher` (M, C) with the probabilities of all classes: "
            "pass the log-probabilities of a TopKTeacher, or of hidden states their logits, and omit it"
        )


def with_logits(call: KDCall) -> KDCall:
    """Return a call whose teacher's probabilities are replaced by their logarithms, in the rows that are used."""
    values = call.teacher if call.rows is None else pick_rows(call.teacher, call.rows)
    return call.replace(teacher=log_probabilities(values), rows=None)


def log_probabilities(probabilities: Tensor) -> Tensor:
    """The logarithms, in float32 or wider: they are logits of the same distribution. That of 0 is -inf, a mask."""
    return probabilities.to(torch.promote_types(probabilities.dtype, torch.float32)).log()


def pick_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return ``x[rows]``, with NaN in place of rows that are out of range, as the kernels do on a GPU."""
    if x.shape[0] == 0:
        return x.new_zeros((rows.shape[0], *x.shape[1:]))
    inside = rows.clamp(0, x.shape[0] - 1)
    picked = x.index_select(0, inside)
    return torch.where((inside == rows).unsqueeze(1), picked, torch.nan)


def with_class_weights(call: KDCall, class_weights: Tensor) -> KDCall:
    """Return a call in which the cross-entropy of each row is multiplied by the weight of its label.

    A row's loss W ((1 - alpha) w CE + alpha KL) is W s ((1 - alpha / s) CE + (alpha / s) KL) for
    s = (1 - alpha) w + alpha: one with another weight and another alpha. The divisor of a mean stays the sum of W.
    """
    if call.labels is None:
        return call
    labels, c = call.labels, call.logits.shape[1]
    if labels.is_floating_point():
        return call.replace(labels=labels * class_weights)
    dtype = torch.float64 if labels.device.type == "cpu" else torch.float32
    of_row = class_weights.to(dtype).index_select(0, labels.clamp(0, max(c - 1, 0))) if c else labels.to(dtype)
    alpha = call.alpha if call.alphas is None else call.alphas.to(dtype)
    share = (1 - alpha) * of_row + alpha
    alphas = torch.where(share > 0, alpha / torch.where(share > 0, share, 1), 0.0)
    if isinstance(alpha, Tensor):  # one out of range stays so, for the checks and the kernels
        alphas = torch.where((alpha >= 0) & (alpha <= 1), alphas, alpha)
    wide = torch.promote_types(call.logits.dtype, torch.float32)
    weights = torch.ones_like(share) if call.weights is None else call.weights
    scaled = share * weights
    reduction = call.reduction
    if reduction == "mean":
        scaled = scaled * safe_reciprocal(torch.where(labels != call.ignore_index, weights, 0).sum())
        reduction = "sum"
    return call.replace(alphas=alphas, weights=scaled.to(wide), reduction=reduction)


def flat_arguments(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor | TopKTeacher,
    rows: Tensor | None,
    of_rows: tuple[Any, Any, Any],
) -> tuple[Tensor, Tensor | None, Tensor | TopKTeacher, Tensor | None, tuple[Any, ...]]:
    """Return the arguments of ``kd_loss`` with the leading dimensions of logits (..., C) flattened into rows.

    Args:
        logits: (..., C).
        labels: Classes (...), probabilities (..., C), or None.
        teacher: As in ``kd_loss``, with the same leading dimensions unless there are ``rows``.
        rows: (...) or None.
        of_rows: Weights, alpha and temperature, which may be tensors (...).

    Raises:
        ShapeError: If an argument has other leading dimensions.
    """
    lead = logits.shape[:-1]
    others = tuple(
        flat_vector(name, x, lead) for name, x in zip(("weights", "alpha", "temperature"), of_rows, strict=True)
    )
    rows_of = None if rows is None else flat_vector("rows", rows, lead)
    return flat_matrix("logits", logits), flat_labels(labels, lead), flat_teacher(teacher, rows, lead), rows_of, others


def flat_labels(labels: Tensor | None, lead: torch.Size) -> Tensor | None:
    """Return classes (...) as (rows,), and probabilities (..., C) as (rows, C)."""
    if not isinstance(labels, Tensor):
        return labels
    if labels.is_floating_point():
        return flat_matrix("labels", labels, lead)
    flat: Tensor = flat_vector("labels", labels, lead)
    return flat


def flat_matrix(name: str, x: Tensor, lead: torch.Size | None = None) -> Tensor:
    """Return (..., C) as (rows, C); with ``lead``, check that the leading dimensions are these or already flat."""
    if not isinstance(x, Tensor) or x.dim() <= 2:
        return x
    if lead is not None and x.shape[:-1] != lead:
        raise ShapeError(f"`{name}` has shape {tuple(x.shape)}: its leading dimensions must be {tuple(lead)}")
    return x.flatten(0, -2)


def flat_vector(name: str, x: Any, lead: torch.Size) -> Any:
    """Return one entry per row as (rows,), and anything else unchanged.

    Raises:
        ShapeError: If a tensor of several dimensions has others than ``lead``.
    """
    if not isinstance(x, Tensor) or x.dim() <= 1:
        return x
    if x.shape != lead:
        raise ShapeError(f"`{name}` has shape {tuple(x.shape)}: must be {tuple(lead)}, one for each row of `logits`")
    return x.flatten()


def flat_teacher(teacher: Tensor | TopKTeacher, rows: Tensor | None, lead: torch.Size) -> Tensor | TopKTeacher:
    """Return a teacher with leading dimensions as one with rows; without ``rows``, they must be ``lead``."""
    expected = lead if rows is None else None
    if isinstance(teacher, Tensor):
        return flat_matrix("teacher", teacher, expected)
    if isinstance(teacher, tuple) and len(teacher) == 3 and isinstance(teacher[0], Tensor) and teacher[0].dim() > 2:
        values, classes, tail = teacher
        shape = values.shape[:-1]
        return TopKTeacher(
            flat_matrix("teacher.values", values, expected),
            flat_matrix("teacher.classes", classes, shape),
            flat_vector("teacher.tail", tail, shape),
        )
    return teacher
