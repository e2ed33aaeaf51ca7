"""The distillation loss in plain PyTorch: differentiable, correct in float64, the oracle of the kernels' tests."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["inverse_of", "reference_loss", "reference_terms"]


def reference_terms(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor,
    rows: Tensor | None,
    classes: Tensor | None,
    tail: Tensor | None,
    *,
    temperature: float,
    ignore_index: int,
    reverse: bool,
    use_ce: bool = True,
    use_kl: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy and divergence of each row, and which rows count: three tensors (N,).

    Computes in float64 for float64 logits, else in float32. Rows that do not count are zero. A term that is not used is
    zero and not computed. A label, a row or a class id outside its range is clamped, and makes its row's term NaN.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    zeros = z.new_zeros(z.shape[0])
    counted = torch.ones(z.shape[0], dtype=torch.bool, device=z.device) if labels is None else labels != ignore_index
    if labels is not None:
        z = torch.where(counted.unsqueeze(1), z, 0)  # an ignored row may hold anything, NaN included
    ce, kl = zeros, zeros
    if use_ce and labels is not None:
        label, unknown = _within(torch.where(counted, labels, 0), z.shape[1])
        ce = _spoilt(-torch.log_softmax(z, 1).gather(1, label.unsqueeze(1)).squeeze(1), unknown)
    if use_kl:
        if rows is not None:
            index, bad = _within(torch.where(counted, rows, 0), teacher.shape[0])
            teacher = teacher[index]
            classes = None if classes is None else classes[index]
            tail = None if tail is None else tail[index]
        else:
            bad = torch.zeros_like(counted)
        t = teacher.to(z.dtype) / temperature
        log_p = torch.log_softmax(z / temperature, 1)
        if classes is None:
            log_q = torch.log_softmax(t, 1)
        else:
            assert tail is not None
            ids, wild = _within(classes.long(), z.shape[1])
            bad = bad | wild.any(1)
            log_p, log_q = _outcomes(log_p, t, ids, tail.to(z.dtype))
        kl = _divergence(log_p, log_q) if reverse else _divergence(log_q, log_p)
        kl = _spoilt(kl, bad)
    return torch.where(counted, ce, zeros), torch.where(counted, kl, zeros), counted


def _within(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The indices clamped to [0, size), and which of them were not in it."""
    inside = index.clamp(0, max(size - 1, 0))
    return inside, inside != index


def _spoilt(x: Tensor, bad: Tensor) -> Tensor:
    """NaN where something is bad: by a factor, so that the gradient is NaN as well."""
    return x * torch.where(bad, torch.nan, 1.0).to(x.dtype)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of each row. A class with p = 0 adds nothing and gets no gradient, whatever q is."""
    absent = log_p.exp() == 0
    log_p = torch.where(absent, 0, log_p)
    gap = log_p - torch.where(absent, 0, log_q)
    return (torch.where(absent, 0, log_p.exp()) * gap).sum(1)


def _outcomes(log_p: Tensor, t: Tensor, classes: Tensor, tail: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the k + 1 outcomes: each of the teacher's classes, and any other class."""
    log_q = torch.log_softmax(torch.cat([t, tail.unsqueeze(1)], 1), 1)
    others = log_p.scatter(1, classes, -torch.inf)
    none = torch.isneginf(others).all(1)
    rest = torch.where(none.unsqueeze(1), 0, others).logsumexp(1)
    rest = torch.where(none, -torch.inf, rest)
    return torch.cat([log_p.gather(1, classes), rest.unsqueeze(1)], 1), log_q


def reference_loss(
    logits: Tensor,
    labels: Tensor | None,
    teacher: Tensor,
    rows: Tensor | None,
    classes: Tensor | None,
    tail: Tensor | None,
    weights: Tensor | None,
    *,
    alpha: float,
    temperature: float,
    t_squared: bool,
    ignore_index: int,
    reduction: str,
    reverse: bool,
) -> Tensor:
    """The loss of ``kdfast.kd_loss``, with every argument checked already."""
    ce, kl, counted = reference_terms(
        logits,
        labels,
        teacher,
        rows,
        classes,
        tail,
        temperature=temperature,
        ignore_index=ignore_index,
        reverse=reverse,
        use_ce=alpha < 1,
        use_kl=alpha > 0,
    )
    factor = alpha * temperature**2 if t_squared else alpha
    loss = (1 - alpha) * ce + factor * kl
    weight = counted.to(loss.dtype) if weights is None else torch.where(counted, weights.to(loss.dtype), 0)
    if reduction == "none":
        return loss * weight
    total = (loss * weight).sum()
    if reduction == "sum":
        return total
    return total * inverse_of(weight.sum())


def inverse_of(mass: Tensor) -> Tensor:
    """What a mean multiplies by: 1 / mass, and 0 where nothing counts; differentiable."""
    return torch.where(mass == 0, 0, 1 / torch.where(mass == 0, 1, mass))
