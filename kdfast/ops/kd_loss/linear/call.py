"""Validated arguments of a ``linear_kd_loss`` call, passed as one object."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdfast.ops.kd_loss.call import KDCall
from kdfast.ops.kd_loss.targets.forms import log_probabilities, pick_rows

__all__ = ["Layer", "LinearCall", "LinearTeacher"]


class LinearTeacher(NamedTuple):
    """A teacher as its hidden states and its last layer; its logits are computed chunk by chunk.

    Attributes:
        hidden: (M, K) hidden states, one row per token, or (..., K).
        weight: (V, K) weights of the last layer.
        bias: (V,) or None.
        softcap: As ``softcap`` of ``linear_kd_loss``, for the teacher's logits.
        logit_scale: As ``logit_scale`` of ``linear_kd_loss``, for the teacher's logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class Layer(NamedTuple):
    """A last layer: logits = cap(scale (hidden W^T + b)), where cap(x) = softcap tanh(x / softcap).

    Attributes:
        weight: (V, H).
        bias: (V,) or None.
        softcap: Bound of the logits, or 0 for none.
        scale: Factor of the logits.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float
    scale: float


class LinearCall(NamedTuple):
    """Checked arguments of one ``linear_kd_loss`` call, with leading dimensions flattened into rows.

    A named tuple, so that ``*call`` flattens it for the custom operators and ``LinearCall(*args)`` restores it there.
    Fields that ``KDCall`` has too mean the same.

    Attributes:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        factors: (N,) factor of each row in the result, in the dtype of the loss: its weight, over the divisor of a
            mean.
        teacher_weight: (V, K) if ``teacher`` holds hidden states (M, K), else None.
        reduction: "sum" or "none"; a mean is a sum with other factors.
        softcap: Bound of the student's logits, or 0 for none.
        teacher_softcap: That of the teacher's.
        has_probs: Whether ``teacher`` holds probabilities instead of logits.
        chunk: Rows whose logits are held at a time, or 0 for the number of ``rows_per_chunk``.
        dtype: Floating dtype of the logits.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    teacher: Tensor
    rows: Tensor | None
    classes: Tensor | None
    tail: Tensor | None
    factors: Tensor
    alphas: Tensor | None
    temperatures: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    alpha: float
    temperature: float
    t_squared: bool
    ignore_index: int
    reduction: str
    reverse: bool
    divergence: str
    first_weight: float
    second_weight: float
    label_smoothing: float
    softcap: float
    scale: float
    teacher_softcap: float
    teacher_scale: float
    has_probs: bool
    chunk: int
    dtype: torch.dtype

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The tensors, some of them None."""
        return self[:13]

    def rows_per_chunk(self, trains_weight: bool) -> int:
        """Rows whose logits are held at a time.

        Enough for the matrix products to be bound by arithmetic. Weights in half precision need a float32 sum of their
        gradient as soon as there are two chunks, so that up to 2 H rows one chunk takes less memory.
        """
        n, h = self.hidden.shape
        if self.chunk > 0:
            return min(self.chunk, max(n, 1))
        if trains_weight and self.weight.itemsize == 2 and n <= 2 * h:
            return max(n, 1)
        size = 1024 if self.hidden.device.type != "cpu" else 256 if self.dtype.itemsize == 2 else 128
        return min(n, size) or 1

    @property
    def student(self) -> Layer:
        """The student's last layer."""
        return Layer(self.weight, self.bias, self.softcap, self.scale)

    @property
    def teacher_layer(self) -> Layer | None:
        """The teacher's last layer, if it is given by hidden states."""
        if self.teacher_weight is None:
            return None
        return Layer(self.teacher_weight, self.teacher_bias, self.teacher_softcap, self.teacher_scale)

    def with_factors(self, factors: Tensor) -> LinearCall:
        """Return a copy with other factors; ``_replace`` cannot be traced by ``torch.compile`` in torch 2.8."""
        fields: list[Any] = [*self[:8], factors, *self[9:]]
        return LinearCall(*fields)

    def new_loss(self) -> Tensor:
        """Uninitialized loss: float32, or float64 for float64 logits; (N,) for the reduction "none", else a scalar."""
        dtype = torch.promote_types(self.dtype, torch.float32)
        return self.hidden.new_empty(self.hidden.shape[:1] if self.reduction == "none" else (), dtype=dtype)

    def chunk_call(self, begin: int, end: int, logits: Tensor, teacher: Tensor | None) -> KDCall:
        """The call of ``kd_loss`` for rows [begin, end), whose logits are given.

        Args:
            begin: First row.
            end: Row after the last one.
            logits: (end - begin, V).
            teacher: The teacher's logits of those rows if it is given by hidden states, else None.
        """
        values, rows, classes, tail = self.teacher, _part(self.rows, begin, end), self.classes, self.tail
        if teacher is not None:
            values, rows = teacher, None
        elif rows is None:
            values, classes, tail = values[begin:end], _part(classes, begin, end), _part(tail, begin, end)
        elif classes is None and (values.dtype == torch.float64 or self.has_probs):
            values, rows = pick_rows(values, rows), None  # not the whole teacher is converted for each chunk
        if self.has_probs:
            values = log_probabilities(values)
        of_rows = (_part(x, begin, end) for x in (self.factors, self.alphas, self.temperatures))
        tensors = (logits, _part(self.labels, begin, end), values, rows, classes, tail, *of_rows)
        numbers = (self.alpha, self.temperature, self.t_squared, self.ignore_index, "none", self.reverse)
        parts = (self.first_weight, self.second_weight, self.label_smoothing)
        fields: list[Any] = [*tensors, *numbers, self.divergence, *parts]
        return KDCall(*fields)


def _part(x: Tensor | None, begin: int, end: int) -> Tensor | None:
    return None if x is None else x[begin:end]
