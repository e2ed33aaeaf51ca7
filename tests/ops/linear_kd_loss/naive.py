"""The loss of hidden states and a last layer, written row by row from its formula, in float64."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

IGNORE = -100


def layer(hidden, weight, bias=None, softcap=None, scale=1.0):
    """Logits of a last layer."""
    z = hidden @ weight.T
    z = (z if bias is None else z + bias) * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def divergence(z, t, kind, beta, classes=None, tail=None):
    """Divergence of one row of tempered logits z from teacher logits t, or from top-k logits and a tail."""
    p, q = F.log_softmax(z, 0), t
    if classes is not None:
        others = torch.ones_like(z, dtype=torch.bool)
        others[classes] = False
        rest = p[others].logsumexp(0, keepdim=True) if others.any() else p.new_full((1,), -math.inf)
        p, q = torch.cat([p[classes], rest]), torch.cat([t, tail.reshape(1)])
    q = F.log_softmax(q, 0)
    if kind == "jsd":
        m = torch.logsumexp(torch.stack([q + math.log(beta), p + math.log(1 - beta)]), 0)
        return beta * kl(q, m) + (1 - beta) * kl(p, m)
    return kl(q, p) if kind == "forward" else kl(p, q)


def kl(log_a, log_b):
    """KL divergence of distributions given by their logarithms; an outcome that a has not adds nothing."""
    present = log_a > -math.inf
    return (log_a[present].exp() * (log_a[present] - log_b[present])).sum()


def loss(z, labels, rows_of_teacher, *, alpha, temperature, kind, beta=0.5, t_squared=True, weights=None):
    """Losses (N,) of logits (N, V); the teacher's row i is (logits,) or (top-k logits, classes, tail)."""
    n = z.shape[0]
    alphas, temperatures = (torch.as_tensor(x, dtype=torch.float64).expand(n) for x in (alpha, temperature))
    losses = []
    for i in range(n):
        if labels is not None and labels.dim() == 1 and labels[i] == IGNORE:
            losses.append(0 * z[i].nan_to_num().sum())
            continue
        a, t = float(alphas[i]), float(temperatures[i])
        values, *topk = rows_of_teacher[i]
        total = z.new_zeros(())
        if a < 1:
            log_p = F.log_softmax(z[i], 0)
            total = total + (1 - a) * (-log_p[labels[i]] if labels.dim() == 1 else -(labels[i].double() * log_p).sum())
        if a > 0:
            d = divergence(z[i] / t, values.double() / t, kind, beta, *topk)
            total = total + a * (t * t if t_squared else 1) * d
        losses.append(total * (1 if weights is None else float(weights[i])))
    return torch.stack(losses) if losses else z.sum(1)
