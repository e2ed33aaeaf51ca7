"""The distillation loss in plain PyTorch: differentiable, correct in float64, the oracle of every kernel test."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kdfast.ops.kd_loss.call import MAX_T, MIN_T, KDCall

__all__ = ["STANDARDIZATION_EPSILON", "reference_loss", "reference_terms", "safe_reciprocal", "smoothed_labels"]

STANDARDIZATION_EPSILON = 1e-7


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
    if call.hard_labels is not None:
        counted = call.hard_labels != call.ignore_index
    # Rows that have each term: all of them, also those whose alpha is NaN, unless its weight is 0.
    hard = counted if call.alphas is None else counted & ~(call.alphas >= 1)
    soft = counted if call.alphas is None else counted & ~(call.alphas <= 0)
    ce = kl = zeros
    # A row that is left out may hold anything, even NaN.
    if use_ce and call.labels is not None:
        ce = _cross_entropy(call, hard, torch.where(hard.unsqueeze(1), z, 0))
    if use_kl:
        kl = _row_divergence(call, soft, torch.where(soft.unsqueeze(1), z, 0))
    return torch.where(hard, ce, zeros), torch.where(soft, kl, zeros), counted


def reference_loss(call: KDCall) -> Tensor:
    """Compute ``kdfast.kd_loss``."""
    ce, kl, counted = reference_terms(call, use_ce=call.use_ce, use_kl=call.use_kl)
    ce_factor, kl_factor = _factors(call, ce)
    loss = ce_factor * ce + kl_factor * kl
    if call.alphas is not None or call.temperatures is not None:
        loss = torch.where(counted, loss, 0)  # the factors of an ignored row may be NaN
    weights = torch.ones_like(loss) if call.weights is None else call.weights.to(loss.dtype)
    weights = torch.where(counted, weights, 0)
    if call.reduction == "none":
        return loss * weights
    total = (loss * weights).sum()
    return total if call.reduction == "sum" else total * safe_reciprocal(weights.sum())


def safe_reciprocal(total: Tensor) -> Tensor:
    """Return 1 / total, and 0 where the total is 0: the factor of a mean over no rows. Differentiable."""
    return torch.where(total == 0, 0, 1 / torch.where(total == 0, 1, total))


def _factors(call: KDCall, like: Tensor) -> tuple[float | Tensor, float | Tensor]:
    """Factors of the cross-entropy and of the divergence; NaN for samples whose alpha is out of range."""
    alpha = call.alpha if call.alphas is None else call.alphas.to(like.dtype)
    temperature = call.temperature if call.temperatures is None else call.temperatures.to(like.dtype)
    if isinstance(alpha, Tensor):
        alpha = _nan_where(~((alpha >= 0) & (alpha <= 1)), alpha)
    return 1 - alpha, alpha * temperature**2 if call.t_squared else alpha


def _cross_entropy(call: KDCall, counted: Tensor, z: Tensor) -> Tensor:
    log_p = torch.log_softmax(z, 1)
    if call.soft_labels is not None:
        target = smoothed_labels(call.soft_labels, call.label_smoothing).to(z.dtype)
        return -(target * torch.where(target == 0, 0, log_p)).sum(1)
    assert call.labels is not None
    label, bad = _clamp(torch.where(counted, call.labels, 0), z.shape[1])
    ce = -log_p.gather(1, label.unsqueeze(1)).squeeze(1)
    if call.label_smoothing > 0:
        ce = (1 - call.label_smoothing) * ce - call.label_smoothing * log_p.mean(1)
    return _nan_where(bad, ce)


def smoothed_labels(labels: Tensor, smoothing: float) -> Tensor:
    """Soft labels with a share of the uniform distribution, in float32 or wider."""
    labels = labels.to(torch.promote_types(labels.dtype, torch.float32))
    return labels if smoothing == 0 else (1 - smoothing) * labels + smoothing / labels.shape[1]


def _row_divergence(call: KDCall, counted: Tensor, z: Tensor) -> Tensor:
    teacher, classes, tail, bad = _pick_rows(call, counted)
    t = teacher.to(z.dtype)
    temperature: float | Tensor = call.temperature
    if call.temperatures is not None:
        bad = bad | ~((call.temperatures >= MIN_T) & (call.temperatures <= MAX_T))
        temperature = call.temperatures.to(z.dtype).unsqueeze(1)
    if call.divergence == "dkd":
        assert call.labels is not None
        label, bad_label = _clamp(torch.where(counted, call.labels, 0), z.shape[1])
        return _nan_where(bad | bad_label, _decoupled(call, z / temperature, t / temperature, label))
    if call.divergence == "standardized":
        z, t = _standardize(z), _standardize(t)
    log_p = torch.log_softmax(z / temperature, 1)
    t = t / temperature
    if call.divergence == "jsd":
        return _nan_where(bad, _jensen_shannon(call, log_p, torch.log_softmax(t, 1)))
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


def _jensen_shannon(call: KDCall, log_p: Tensor, log_q: Tensor) -> Tensor:
    absent = torch.isneginf(log_p) & torch.isneginf(log_q)
    of_q = torch.where(absent, 0, log_q) + math.log(call.first_weight)
    of_p = torch.where(absent, 0, log_p) + math.log(call.second_weight)
    mixture = torch.logaddexp(of_q, of_p)
    return call.first_weight * _divergence(log_q, mixture) + call.second_weight * _divergence(log_p, mixture)


def _decoupled(call: KDCall, z: Tensor, t: Tensor, label: Tensor) -> Tensor:
    log_p, log_p_others = _split(torch.log_softmax(z, 1), label)
    log_q, log_q_others = _split(torch.log_softmax(t, 1), label)
    value = z.new_zeros(z.shape[0])
    if call.first_weight > 0:
        value = value + call.first_weight * _divergence(log_q, log_p)
    if call.second_weight > 0:
        value = value + call.second_weight * _divergence(log_q_others, log_p_others)
    return value


def _split(log_p: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the label's class and any other, (N, 2), and of the others without that class, (N, C).

    If all others are masked, their log-probabilities are -inf.
    """
    others = log_p.scatter(1, label.unsqueeze(1), -torch.inf)
    none = torch.isneginf(others).all(1, keepdim=True)
    safe = torch.where(none, 0, others)
    rest = torch.where(none, -torch.inf, safe.logsumexp(1, keepdim=True))
    odds = log_p.gather(1, label.unsqueeze(1)) - rest
    # Accurate where either probability is close to 1. Beyond the threshold, softplus is the identity in float64, too.
    pair = -F.softplus(torch.cat([-odds, odds], 1), threshold=50)
    return pair, torch.where(none, -torch.inf, torch.log_softmax(safe, 1))


def _standardize(z: Tensor) -> Tensor:
    """Logits of each row with mean 0 and standard deviation 1 over the classes that are not masked."""
    masked = torch.isneginf(z)
    count = (~masked).sum(1, keepdim=True)
    mean = torch.where(masked, 0, z).sum(1, keepdim=True) / count
    centered = torch.where(masked, 0, z - mean)
    variance = centered.square().sum(1, keepdim=True) / (count - 1).clamp_min(1)
    # The derivative of the root is infinite at 0.
    deviation = torch.where(variance == 0, 0, torch.where(variance == 0, 1, variance).sqrt())
    return torch.where(masked, -torch.inf, centered / (deviation + STANDARDIZATION_EPSILON))


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
