"""The distillation loss in plain PyTorch: differentiable, correct in float64, the oracle of every kernel test."""

from __future__ import annotations

import torch
from torch import Tensor

from kdfast.ops.kd_loss.call import KDCall

__all__ = ["reference_loss", "reference_terms", "safe_reciprocal"]


def reference_terms(call: KDCall, *, use_ce: bool = True, use_kl: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the cross-entropy and the divergence of each row, and a mask of non-ignored rows.

    Computes in float64 for float64 logits, else in float32. Ignored rows are zero, and so is a term that is not used. A
    label, a row or a class id out of range is clamped and makes its row's term NaN, and so does a class that a top-k
    teacher repeats.

    Returns:
        Three tensors (N,); the last one boolean.
    """
    z = call.logits if call.logits.dtype == torch.float64 else call.logits.float()
    zeros = z.new_zeros(z.shape[0])
    counted = torch.ones_like(zeros, dtype=torch.bool)
    if call.labels is not None:
        counted = call.labels != call.ignore_index
        z = torch.where(counted.unsqueeze(1), z, 0)  # an ignored row may hold anything, even NaN
    ce = _cross_entropy(call.labels, counted, z) if use_ce and call.labels is not None else zeros
    kl = _row_divergence(call, counted, z) if use_kl else zeros
    return torch.where(counted, ce, zeros), torch.where(counted, kl, zeros), counted


def reference_loss(call: KDCall) -> Tensor:
    """Compute ``kdfast.kd_loss``."""
    ce, kl, counted = reference_terms(call, use_ce=call.alpha < 1, use_kl=call.alpha > 0)
    factor = call.alpha * call.temperature**2 if call.t_squared else call.alpha
    loss = (1 - call.alpha) * ce + factor * kl
    weights = torch.ones_like(loss) if call.weights is None else call.weights.to(loss.dtype)
    weights = torch.where(counted, weights, 0)
    if call.reduction == "none":
        return loss * weights
    total = (loss * weights).sum()
    return total if call.reduction == "sum" else total * safe_reciprocal(weights.sum())


def safe_reciprocal(total: Tensor) -> Tensor:
    """Return 1 / total, and 0 where the total is 0: the factor of a mean over no rows. Differentiable."""
    return torch.where(total == 0, 0, 1 / torch.where(total == 0, 1, total))


def _cross_entropy(labels: Tensor, counted: Tensor, z: Tensor) -> Tensor:
    label, bad = _clamp(torch.where(counted, labels, 0), z.shape[1])
    ce = -torch.log_softmax(z, 1).gather(1, label.unsqueeze(1)).squeeze(1)
    return _nan_where(bad, ce)


def _row_divergence(call: KDCall, counted: Tensor, z: Tensor) -> Tensor:
    teacher, classes, tail, bad = _pick_rows(call, counted)
    log_p = torch.log_softmax(z / call.temperature, 1)
    t = teacher.to(z.dtype) / call.temperature
    if classes is None:
        log_q = torch.log_softmax(t, 1)
    else:
        assert tail is not None
        ids, bad_ids = _clamp(classes.long(), z.shape[1])
        log_p, log_q, repeated = _topk_outcomes(log_p, t, ids, tail.to(z.dtype), ~torch.isneginf(teacher))
        bad = bad | bad_ids.any(1) | repeated
    kl = _divergence(log_p, log_q) if call.reverse else _divergence(log_q, log_p)
    return _nan_where(bad, kl)


def _pick_rows(call: KDCall, counted: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The teacher, its class ids and its tail at each sample's row, and which rows are out of range."""
    if call.rows is None:
        return call.teacher, call.classes, call.tail, torch.zeros_like(counted)
    index, bad = _clamp(torch.where(counted, call.rows, 0), call.teacher.shape[0])
    classes = None if call.classes is None else call.classes[index]
    tail = None if call.tail is None else call.tail[index]
    return call.teacher[index], classes, tail, bad


def _clamp(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The indices clamped to [0, size), and which of them were outside."""
    inside = index.clamp(0, max(size - 1, 0))
    return inside, inside != index


def _nan_where(bad: Tensor, x: Tensor) -> Tensor:
    """Return ``x`` with NaN where ``bad``, by multiplication, so that the gradient is NaN too."""
    return x * torch.where(bad, torch.nan, 1.0).to(x.dtype)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row. A class with p = 0 adds nothing and gets no gradient, even if q = 0."""
    absent = log_p.exp() == 0
    log_p = torch.where(absent, 0, log_p)
    difference = log_p - torch.where(absent, 0, log_q)
    return (torch.where(absent, 0, log_p.exp()) * difference).sum(1)


def _topk_outcomes(
    log_p: Tensor, t: Tensor, classes: Tensor, tail: Tensor, kept: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the k + 1 outcomes, each of the teacher's classes and any other; and if a class repeats.

    Entries that are not kept have probability zero, and their classes are among the others.
    """
    log_q = torch.log_softmax(torch.cat([t, tail.unsqueeze(1)], 1), 1)
    count = torch.zeros_like(log_p).scatter_add(1, classes, kept.to(log_p.dtype))
    others = torch.where(count > 0, -torch.inf, log_p)
    none = torch.isneginf(others).all(1)
    rest = torch.where(none.unsqueeze(1), 0, others).logsumexp(1)
    rest = torch.where(none, -torch.inf, rest)
    log_p = torch.where(kept, log_p.gather(1, classes), -torch.inf)
    return torch.cat([log_p, rest.unsqueeze(1)], 1), log_q, (count > 1).any(1)
