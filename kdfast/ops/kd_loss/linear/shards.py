"""Loss and gradient of a chunk whose classes are split over the processes of a group, in plain PyTorch.

Each process has the logits of some classes. The largest logits, the sums of exponentials and the divergence of a row
are reduced over the group: three reductions of a few numbers per row for each chunk, and one of the gradient of the
hidden states at the end.

Source of the split of a cross-entropy by classes: Shoeybi et al., Megatron-LM, 2019, https://arxiv.org/abs/1909.08053,
section 3.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from kdfast.errors import ShapeError
from kdfast.ops.kd_loss.call import KDCall

__all__ = ["Shard", "check_shard", "make_shard", "shard_losses", "sum_over_group"]


class Shard(NamedTuple):
    """The classes [begin, begin + own) of this process, out of ``total``."""

    group: Any
    begin: int
    own: int
    total: int


def make_shard(group: Any, weight: Tensor) -> Shard:
    """Exchange the numbers of classes; they are in the order of the ranks of the group.

    Raises:
        TypeError: If it is no group of processes with this one among them.
    """
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"`group` is {group!r}: pass a process group of torch.distributed that this process is in")
    own = torch.tensor([weight.shape[0]], device=weight.device)
    sizes = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, own, group=group)
    counts = [int(size) for size in sizes]
    rank = dist.get_rank(group)
    return Shard(group, sum(counts[:rank]), counts[rank], sum(counts))


def check_shard(call: KDCall, shard: Shard, readable: bool) -> None:
    """Check that a call can be split by classes, and its labels.

    Raises:
        ShapeError: If the teacher is a ``TopKTeacher``, or labels are probabilities.
        IndexError: If a label is out of range.
    """
    if call.classes is not None:
        raise ShapeError("`teacher` is a TopKTeacher, which cannot be split by `group`: pass logits or hidden states")
    if call.soft_labels is not None:
        raise ShapeError("`labels` are probabilities, which cannot be split by `group`: pass classes")
    if call.labels is None or not readable:
        return
    bad = ((call.labels < 0) | (call.labels >= shard.total)) & (call.labels != call.ignore_index)
    if bool(bad.any()):
        at = int(bad.nonzero()[0])
        valid = f"[0, {shard.total}), the classes of all processes, or `ignore_index` ({call.ignore_index})"
        raise IndexError(f"`labels[{at}]` is {int(call.labels[at])}: must be in {valid}")


def sum_over_group(shard: Shard, x: Tensor) -> Tensor:
    """Replace a tensor by its sum over the processes, and return it."""
    dist.all_reduce(x, group=shard.group)
    return x


def shard_losses(call: KDCall, shard: Shard, out: Tensor | None) -> Tensor:
    """Return the losses (n,) of a chunk, equal in all processes, and write the gradient of this process's logits.

    Args:
        call: The call of this process's classes; without reduction, with weights.
        shard: Which classes these are.
        out: (n, own) for the gradient, or None. May be the logits.
    """
    wide = torch.promote_types(call.logits.dtype, torch.float32)
    z, n = call.logits.to(wide), call.logits.shape[0]
    t = call.teacher[:n] if call.rows is None else call.teacher.index_select(0, call.rows)
    alpha, temperature = (
        torch.as_tensor(one if each is None else each, dtype=wide, device=z.device).expand(n).unsqueeze(1)
        for one, each in ((call.alpha, call.alphas), (call.temperature, call.temperatures))
    )
    counted = torch.ones_like(alpha, dtype=torch.bool)
    if call.labels is not None:
        counted = (call.labels != call.ignore_index).unsqueeze(1)
    largest = torch.stack([z.amax(1), t.to(wide).amax(1)])
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=shard.group)
    largest = torch.where(largest == -torch.inf, 0, largest)
    z, t = z - largest[0].unsqueeze(1), (t.to(wide) - largest[1].unsqueeze(1)) / temperature
    label, owned = _own_labels(call, shard)
    of_label = z.gather(1, label) * owned
    sums = [x.sum(1) for x in (z.exp(), (z / temperature).exp(), t.exp(), torch.where(owned, of_label, 0))]
    of_z, of_tempered, of_t, at_label, total = sum_over_group(shard, torch.stack([*sums, z.sum(1)])).unsqueeze(2)
    log_p, log_q = z / temperature - of_tempered.log(), t - of_t.log()
    divergence, slope = _divergence(call, shard, log_p, log_q)
    target, smoothing = at_label, call.label_smoothing
    if smoothing > 0:
        target = (1 - smoothing) * at_label + smoothing / shard.total * total
    factor = call.weights.to(wide).unsqueeze(1) if call.weights is not None else torch.ones_like(alpha)
    kl_factor = alpha * temperature**2 if call.t_squared else alpha
    hard = torch.where(alpha < 1, (1 - alpha) * (of_z.log() - target), 0)
    soft = torch.where(alpha > 0, kl_factor * divergence, 0)
    if out is not None:
        onehot = torch.zeros_like(z).scatter_(1, label, owned.to(wide) * (1 - smoothing)) + smoothing / shard.total
        grad = (1 - alpha) * (z.exp() / of_z - onehot) + torch.where(alpha > 0, kl_factor / temperature * slope, 0)
        out.copy_(torch.where(counted, factor * grad, 0))
    return torch.where(counted, factor * (hard + soft), 0).squeeze(1)


def _own_labels(call: KDCall, shard: Shard) -> tuple[Tensor, Tensor]:
    """Labels (n, 1) relative to this process's classes, and which of them it owns; the others are clamped."""
    n = call.logits.shape[0]
    labels = call.logits.new_zeros(n, dtype=torch.int64) - 1 if call.labels is None else call.labels - shard.begin
    owned = (labels >= 0) & (labels < shard.own)
    return labels.clamp(0, shard.own - 1).unsqueeze(1), owned.unsqueeze(1)


def _divergence(call: KDCall, shard: Shard, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence (n, 1) of all classes, and its derivative by the tempered logits of this process."""
    p, q = log_p.exp(), log_q.exp()
    if call.divergence == "jsd":
        teacher, student = call.first_weight, call.second_weight
        m = torch.logaddexp(log_q + math.log(teacher), log_p + math.log(student))
        parts = torch.stack([_mass(q, log_q - m), _mass(p, log_p - m)])
        of_q, of_p = sum_over_group(shard, parts).unsqueeze(2)
        return teacher * of_q + student * of_p, student * p * torch.where(p > 0, log_p - m - of_p, 0)
    if call.reverse:
        total = sum_over_group(shard, _mass(p, log_p - log_q)).unsqueeze(1)
        return total, p * torch.where(p > 0, log_p - log_q - total, 0)
    return sum_over_group(shard, _mass(q, log_q - log_p)).unsqueeze(1), p - q


def _mass(p: Tensor, x: Tensor) -> Tensor:
    """Sum of p x over the classes of this process; a class with p = 0 adds nothing."""
    return torch.where(p > 0, p * x, 0).sum(1)
