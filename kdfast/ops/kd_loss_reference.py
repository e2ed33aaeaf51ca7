"""The distillation loss in plain PyTorch: differentiable, correct in float64, the oracle of the kernels' tests."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["reference_loss", "reference_terms"]


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
    zero and not computed.
    """
    z = logits if logits.dtype == torch.float64 else logits.float()
    zeros = z.new_zeros(z.shape[0])
    counted = torch.ones(z.shape[0], dtype=torch.bool, device=z.device) if labels is None else labels != ignore_index
    if labels is not None:
        z = torch.where(counted.unsqueeze(1), z, 0)  # an ignored row may hold anything, NaN included
    ce, kl = zeros, zeros
    if use_ce and labels is not None:
        label = torch.where(counted, labels, 0)
        ce = -torch.log_softmax(z, 1).gather(1, label.unsqueeze(1)).squeeze(1)
    if use_kl:
        if rows is not None:
            index = torch.where(counted, rows, 0)
            teacher = teacher[index]
            classes = None if classes is None else classes[index]
            tail = None if tail is None else tail[index]
        t = teacher.to(z.dtype) / temperature
        log_p = torch.log_softmax(z / temperature, 1)
        if classes is None:
            log_q = torch.log_softmax(t, 1)
        else:
            assert tail is not None
            log_p, log_q = _outcomes(log_p, t, classes.long(), tail.to(z.dtype))
        kl = _divergence(log_p, log_q) if reverse else _divergence(log_q, log_p)
    return torch.where(counted, ce, zeros), torch.where(counted, kl, zeros), counted


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
    weight = counted.to(loss.dtype) if weights is None else counted * weights.to(loss.dtype)
    if reduction == "none":
        return loss * weight
    total = (loss * weight).sum()
    if reduction == "sum":
        return total
    mass = weight.sum()
    return total / torch.where(mass == 0, 1, mass)
